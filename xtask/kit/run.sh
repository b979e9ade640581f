#!/bin/sh
# run.sh OUT - runs this kit's tests and benches on the GPUs of this machine and writes what came of them into the folder
# OUT. It installs nothing and changes nothing outside OUT and the folder for temporary files.
# Ends with `N passed, N failed, N skipped`; exit status 1 if any failed, 2 if it could not begin.
# HETMEM_KIT_TIMEOUT is the limit of each program in seconds (600).
set -u
LC_ALL=C
export LC_ALL

cannot() {
    echo "run.sh: $*" >&2
    exit 2
}

[ $# -eq 1 ] && [ -n "$1" ] || cannot "usage: run.sh OUT, a folder for what comes out"
kit=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || cannot "its own folder cannot be entered"
case $1 in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
command -v awk >/dev/null 2>&1 || cannot "awk is needed, and is not there"
# Results of two runs in one folder could not be told apart.
[ ! -e "$out/results.json" ] && [ ! -e "$out/logs" ] || cannot "$1 holds results already: name another folder"
limit=${HETMEM_KIT_TIMEOUT:-600}
case $limit in '' | *[!0-9]*) cannot "HETMEM_KIT_TIMEOUT is '$limit', not a number of seconds" ;; esac
[ "${HETMEM_KIT_STANDIN:-}" != 1 ] || [ -e "$kit/standin/libcuda.so.1" ] ||
    cannot "no standin/ in this kit: \`cargo xtask gpu-kit --check\` packs it"
mkdir -p -- "$out/logs" || cannot "$1 cannot be made"
work=$(mktemp -d) || cannot "no folder for temporary files"
trap 'rm -rf -- "$work"' EXIT
trap 'exit 130' INT TERM HUP
# A copy may have lost these; where it cannot be mended, the programs say so themselves.
chmod +x "$kit"/bin/hetmem* "$kit"/bin/tests/* 2>/dev/null

unset HETMEM_SOCKET HETMEM_TEST_CHILD
HETMEM_TEST_CUDA=real
HETMEM_REQUIRE=gpu
HETMEM_TEST_BINARY=$kit/bin/hetmem
export HETMEM_TEST_CUDA HETMEM_REQUIRE HETMEM_TEST_BINARY

label=
stand_in='STAND-IN DRIVER, NOT HARDWARE: nothing here says anything about a GPU'
if [ "${HETMEM_KIT_STANDIN:-}" = 1 ]; then
    label=$stand_in
    LD_LIBRARY_PATH=$kit/standin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
else
    # Objects move under readers for this long; a trial is over sooner.
    HETMEM_TEST_MOVES_S=${HETMEM_TEST_MOVES_S:-300}
    export HETMEM_TEST_MOVES_S
fi

# limited SECONDS PROGRAM... - stops it then, where there is a `timeout`.
limited() {
    seconds=$1
    shift
    if command -v timeout >/dev/null 2>&1; then
        timeout -k 10 "$seconds" "$@" </dev/null
    else
        "$@" </dev/null
    fi
}

# labelled FILE - its text from standard input, under what the driver was.
labelled() {
    {
        [ -z "$label" ] || printf '%s\n' "$label"
        cat
    } >"$1"
}

# plain FILE - its text as printable ASCII, which every awk and every reader of JSON takes.
plain() {
    tr -c '\11\12\40-\176' '?' <"$1"
}

# first_line FILE - the first that is not empty.
first_line() {
    plain "$1" | tr '\11' ' ' | awk 'NF { print substr($0, 1, 300); exit }'
}

rows=$work/rows
: >"$rows"
row() {
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$rows"
}

doctor() {
    limited 60 "$kit/bin/hetmem" doctor >"$work/out" 2>"$work/err"
    status=$?
    # Whoever put the stand-in in the loader's way: no figure of it may pass for a GPU's.
    if grep -q 'hetmem stand-in GPU' "$work/out"; then
        label=$stand_in
    fi
    cat "$work/out" "$work/err" | labelled "$out/doctor.txt"
    if [ $status -eq 0 ] && [ -s "$work/out" ]; then
        row hetmem doctor passed ''
    else
        row hetmem doctor failed "status $status: $(first_line "$work/err")"
    fi
}

machine() {
    {
        date -u
        uname -a
        getconf GNU_LIBC_VERSION
        cat /proc/driver/nvidia/version
        command -v timeout >/dev/null 2>&1 || echo "no \`timeout\` here: no program was limited"
    } 2>&1 | labelled "$out/machine.txt"
    if command -v nvidia-smi >/dev/null 2>&1; then
        { limited 60 nvidia-smi; limited 60 nvidia-smi topo -m; limited 60 nvidia-smi -q; } 2>&1 | labelled "$out/nvidia-smi.txt"
    else
        echo "skipped: there is no nvidia-smi" | labelled "$out/nvidia-smi.txt"
    fi
}

# program FILE - runs a test program, one test at a time: they share GPUs, and some fill them.
program() {
    name=${1##*/}
    echo "== $name"
    limited 60 "$1" --list >"$work/list" 2>"$work/err"
    listed=$?
    WHY=$(first_line "$work/err")
    export WHY
    status=$listed
    : >"$work/out"
    if [ $listed -eq 0 ]; then
        (cd -- "$work" && limited "$limit" "$1" --test-threads=1 --show-output) >"$work/out" 2>"$work/err"
        status=$?
    fi
    plain "$work/list" >"$work/list.plain"
    plain "$work/out" >"$work/out.plain"
    labelled "$out/logs/$name.log" <"$work/out"
    labelled "$out/logs/$name.err" <"$work/err"
    awk -v PROGRAM="$name" -v STATUS=$status -v LISTED=$listed -v LIMIT="$limit" -f "$kit/awk/libtest.awk" \
        "$work/list.plain" "$work/out.plain" >"$work/new"
    # An awk that failed must not make tests vanish.
    [ $? -eq 0 ] || row "$name" '(parse)' failed "awk could not read its log, logs/$name.log"
    cat "$work/new" >>"$rows"
}

bench() {
    if [ -n "$label" ]; then
        row hetmem 'bench gpu' skipped 'no figure is taken on the stand-in driver'
    elif ! limited 60 "$kit/bin/hetmem" bench gpu --help >/dev/null 2>&1; then
        row hetmem 'bench gpu' skipped 'the hetmem of this kit has no bench gpu'
    else
        echo "== hetmem bench gpu"
        limited "$limit" "$kit/bin/hetmem" bench gpu --json "$out/gpu.json" >"$out/bench-gpu.txt" 2>"$out/logs/bench-gpu.err"
        status=$?
        if [ $status -eq 124 ] || [ $status -eq 137 ] || [ $status -eq 143 ]; then
            row hetmem 'bench gpu' failed "it was stopped after $limit s"
        elif [ $status -ne 0 ]; then
            row hetmem 'bench gpu' failed "status $status: $(first_line "$out/logs/bench-gpu.err")"
        elif [ ! -s "$out/gpu.json" ]; then
            row hetmem 'bench gpu' failed 'it succeeded and wrote no gpu.json'
        else
            row hetmem 'bench gpu' passed ''
        fi
    fi
}

doctor
[ -z "$label" ] || echo "$label"
machine
tests=0
for file in "$kit"/bin/tests/*; do
    [ -f "$file" ] || continue
    tests=$((tests + 1))
    program "$file"
done
[ $tests -gt 0 ] || row kit '(tests)' failed 'there is no test program in bin/tests'
bench

counted=$(awk -v JSON="$out/results.json" -v TABLE="$out/table.txt" -v LABEL="$label" \
    -v VERSION="$(first_line "$kit/manifest.txt")" -f "$kit/awk/report.awk" "$rows") || cannot "awk could not write the results"
cat "$out/table.txt" | sed '$d'
[ -z "$label" ] || echo "$label"
echo "$counted"
case $counted in *' 0 failed, '*) exit 0 ;; *) exit 1 ;; esac
