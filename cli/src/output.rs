//! What goes to standard output: tables for people, JSON for programs. Not errors and not progress, which go to
//! standard error. Invariant: with `--json` standard output holds JSON and nothing else.

use std::io::{self, Write};

/// Standard output in one of two manners.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON rather than text.
    pub(crate) json: bool,
}

impl Output {
    /// Prints one value as JSON, or lines of text.
    pub(crate) fn print(
        self,
        json: impl FnOnce() -> serde_json::Value,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &json())?;
            writeln!(out)?;
        } else {
            text(&mut out)?;
        }
        out.flush()
    }
}

/// Where a column's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints headings and rows.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let headings: Vec<String> = self.columns.iter().map(|(name, _)| (*name).to_owned()).collect();
        let lines = || std::iter::once(&headings).chain(&self.rows);
        let width = |at: usize| {
            let widths = lines().filter_map(|line| line.get(at)).map(|cell| cell.chars().count());
            widths.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        for line in lines() {
            let mut text = String::new();
            for (at, (_, align)) in self.columns.iter().enumerate() {
                let cell = line.get(at).map_or("", String::as_str);
                let space = " ".repeat(widths[at].saturating_sub(cell.chars().count()));
                let gap = if at == 0 { "" } else { "  " };
                match align {
                    Align::Left => text.extend([gap, cell, &space]),
                    Align::Right => text.extend([gap, &space, cell]),
                }
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

/// A number of bytes for people: exact below 10 KiB, else three digits and a unit.
pub(crate) fn bytes(len: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if len < 10 * 1024 {
        return format!("{len} B");
    }
    let mut value = len as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value < 100.0 { 1 } else { 0 };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A time for people.
pub(crate) fn nanos(nanos: u64) -> String {
    let value = nanos as f64;
    match nanos {
        0..1_000 => format!("{nanos} ns"),
        1_000..1_000_000 => format!("{:.1} us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

/// Yes or no, for people.
pub(crate) fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("key", Align::Left), ("bytes", Align::Right)]);
        table.row(["ä".to_owned(), "12345".to_owned()]);
        table.row(["longer".to_owned()]);
        let mut text = Vec::new();
        table.write(&mut text).expect("memory");
        assert_eq!(String::from_utf8(text).expect("text"), "key     bytes\nä       12345\nlonger\n");
    }

    #[test]
    fn people_read_sizes_and_times() {
        for (len, text) in [
            (0, "0 B"),
            (10_239, "10239 B"),
            (10_240, "10.0 KiB"),
            (154_389_504, "147 MiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(len), text);
        }
        for (time, text) in
            [(999, "999 ns"), (1_500, "1.5 us"), (2_000_000, "2.00 ms"), (3_000_000_000, "3.00 s")]
        {
            assert_eq!(nanos(time), text);
        }
    }
}
