# libtest.awk LIST LOG - what came of each test of one program. LIST is the program's `--list`, LOG its output with
# `--show-output`, LIMIT its time in seconds and STATUS its exit status. Prints a line per test: program, test, result
# (passed, failed, skipped), reason, parted by tabs. Always so: every test of LIST has a line, and what has no result in
# the log has failed, unless libtest's own closing count says that the program came to its end and names it no failure.

function verdict(name, text) {
    if (text == "ok") result[name] = "passed"
    else if (text == "FAILED") result[name] = "failed"
    else if (text ~ /^ignored/) {
        result[name] = "skipped"
        sub(/^ignored,? */, "", text)
        reason[name] = text == "" ? "ignored" : "ignored: " text
    } else return 0
    return 1
}

function count(line, word,    parts, i, n, part) {
    n = split(line, parts, /[;.] */)
    for (i = 1; i <= n; i++) {
        part = parts[i]
        if (sub(" " word "$", "", part)) return part + 0
    }
    return 0
}

function ending() {
    if (STATUS == 124) return "was stopped after " LIMIT " s"
    # Not every `timeout` says 124.
    if (STATUS == 143) return "was stopped, after " LIMIT " s or by somebody,"
    if (STATUS == 137) return "was killed, after " LIMIT " s or for want of memory,"
    if (STATUS > 128) return "was killed by signal " (STATUS - 128)
    return "ended with status " STATUS
}

function row(name, word, why) {
    gsub(/\t/, " ", why)
    print PROGRAM "\t" name "\t" word "\t" substr(why, 1, 400)
    rows[word]++
}

{ sub(/\r$/, "") }

FILENAME == ARGV[1] {
    if (sub(/: test$/, "")) order[++tests] = $0
    next
}

/^test result: / { summary = $0; next }

/^successes:$/ || /^failures:$/ { section = $0; block = ""; next }

section == "" && /^test .* \.\.\. / || section == "" && /^test .* \.\.\.$/ {
    at = index($0, " ... ")
    if (!at) at = length($0) - 3
    name = substr($0, 6, at - 6)
    sub(/ - should panic$/, "", name)
    started[name] = 1
    pending = verdict(name, substr($0, at + 5)) ? "" : name
    next
}

# Something else wrote into the line before its result.
section == "" && pending != "" {
    if (verdict(pending, $0)) pending = ""
    next
}

/^---- .* stdout ----$/ {
    block = substr($0, 6, length($0) - 17)
    told = 0
    if (section == "failures:" && result[block] == "") result[block] = "failed"
    next
}

section == "successes:" && /^skipped: / && result[block] != "failed" && result[block] != "skipped" {
    result[block] = "skipped"
    reason[block] = substr($0, 10)
}

# The first panic of a test is its reason; what stands before it, if there is none.
section == "failures:" && result[block] == "failed" {
    if (/^thread .* panicked at / && told < 2) { told = 2; reason[block] = ""; next }
    if (told == 2 && $0 != "") { reason[block] = $0; told = 3; next }
    if (told == 3 && /^ *(left|right): /) { sub(/^ */, ""); reason[block] = reason[block] ", " $0; next }
    if (told == 0 && $0 != "") { reason[block] = $0; told = 1 }
}

END {
    if (tests == 0) {
        if (LISTED != 0) row("(start)", "failed", "it does not start here: " ENVIRON["WHY"])
        exit
    }
    for (i = 1; i <= tests; i++) {
        name = order[i]
        word = result[name]
        why = reason[name]
        if (word == "" && started[name] && summary != "") word = "passed"
        if (word == "") {
            word = "failed"
            why = started[name] ? "the program " ending() " in this test" : "did not run: the program " ending()
        }
        if (word == "failed" && why == "") why = "it says no reason; its output is in logs/" PROGRAM ".log"
        row(name, word, word == "passed" ? "" : why)
    }
    if (summary == "") {
        if (!rows["failed"]) row("(end)", "failed", "the program " ending() " before its closing count")
    } else if (STATUS != 0 && !rows["failed"])
        row("(end)", "failed", "no test failed, and the program " ending())
    else if (count(summary, "failed") != rows["failed"] + 0)
        row("(count)", "failed", "the log and its closing count disagree: " summary)
}
