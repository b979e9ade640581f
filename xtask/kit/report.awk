# report.awk ROWS - results.json and table.txt from the lines of libtest.awk. JSON and TABLE name the files, LABEL says
# that the driver was none; VERSION is the kit's. Prints the count. Always so: the count is that of both files.

function quoted(text) {
    # "&" is what was found: awks differ in how many backslashes make one.
    gsub(/\\/, "&&", text)
    gsub(/"/, "\\\"", text)
    return "\"" text "\""
}

BEGIN { FS = "\t" }

{
    rows++
    program[rows] = $1; name[rows] = $2; result[rows] = $3; reason[rows] = $4
    tally[$3]++
    if (length($1) > wide_program) wide_program = length($1)
    if (length($2) > wide_name) wide_name = length($2)
}

END {
    passed = tally["passed"] + 0; failed = tally["failed"] + 0; skipped = tally["skipped"] + 0
    counted = passed " passed, " failed " failed, " skipped " skipped"
    print "{" > JSON
    print "  \"kit\": " quoted(VERSION) "," > JSON
    print "  \"driver\": " quoted(LABEL == "" ? "real" : LABEL) "," > JSON
    print "  \"passed\": " passed ",\n  \"failed\": " failed ",\n  \"skipped\": " skipped "," > JSON
    print "  \"tests\": [" > JSON
    for (i = 1; i <= rows; i++)
        print "    {\"program\": " quoted(program[i]) ", \"name\": " quoted(name[i]) ", \"result\": " quoted(result[i]) \
            ", \"reason\": " quoted(reason[i]) "}" (i < rows ? "," : "") > JSON
    print "  ]\n}" > JSON
    if (LABEL != "") print LABEL "\n" > TABLE
    format = "%-7s  %-" wide_program "s  %-" wide_name "s  %s"
    for (i = 1; i <= rows; i++) {
        line = sprintf(format, result[i], program[i], name[i], reason[i])
        sub(/ +$/, "", line)
        print line > TABLE
    }
    if (LABEL != "") print "\n" LABEL > TABLE
    print "\n" counted > TABLE
    print counted
}
