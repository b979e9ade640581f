//! The kit's folder: files copied, stripped, counted and listed. Not what belongs into it (`kit`). Invariant: it holds
//! only what this run has put there, and its manifest names every file with its size.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::succeeds;

/// A folder that is being filled.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) root: PathBuf,
}

impl Folder {
    /// Makes it anew: what an earlier run has left is gone.
    pub(crate) fn fresh(root: PathBuf) -> Result<Self, String> {
        if root.exists() {
            fs::remove_dir_all(&root).map_err(|error| format!("{}: {error}", root.display()))?;
        }
        fs::create_dir_all(&root).map_err(|error| format!("{}: {error}", root.display()))?;
        Ok(Self { root })
    }

    /// Writes a file, executable or not.
    pub(crate) fn write(&self, name: &str, text: &str, executable: bool) -> Result<(), String> {
        use std::os::unix::fs::PermissionsExt as _;
        let to = self.place(name)?;
        let mode = if executable { 0o755 } else { 0o644 };
        fs::write(&to, text)
            .and_then(|()| fs::set_permissions(&to, fs::Permissions::from_mode(mode)))
            .map_err(|error| format!("{}: {error}", to.display()))
    }

    /// Copies a file.
    pub(crate) fn copy(&self, from: &Path, name: &str) -> Result<(), String> {
        let to = self.place(name)?;
        fs::copy(from, &to).map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))?;
        Ok(())
    }

    /// Copies a program or a library without its symbols, or whole where there is no `strip`.
    pub(crate) fn copy_stripped(&self, from: &Path, name: &str) -> Result<(), String> {
        let to = self.place(name)?;
        // What the loader needs stays, in a library too.
        let mut strip = Command::new("strip");
        strip.arg("--strip-unneeded").arg("-o").arg(&to).arg(from);
        if succeeds(&mut strip) {
            return Ok(());
        }
        println!("no `strip` takes {}: it is copied whole", from.display());
        self.copy(from, name)
    }

    fn place(&self, name: &str) -> Result<PathBuf, String> {
        let to = self.root.join(name);
        let folder = to.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        Ok(to)
    }

    /// Every file, as a path from the folder, with its size in bytes, sorted.
    pub(crate) fn files(&self) -> Result<Vec<(String, u64)>, String> {
        let found = files_under(&self.root)?;
        let mut named = Vec::new();
        for path in found {
            let size = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
            let name = path.strip_prefix(&self.root).unwrap_or(&path);
            named.push((name.display().to_string(), size));
        }
        named.sort();
        Ok(named)
    }

    /// The newest version of glibc that a program in it asks for: the `N` of `GLIBC_2.N`.
    pub(crate) fn glibc_minor(&self) -> Result<Option<u32>, String> {
        let mut newest = None;
        for path in files_under(&self.root.join("bin"))? {
            let program = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            newest = newest.max(glibc_minor(&program));
        }
        Ok(newest)
    }
}

/// All files below a folder; none if there is no such folder.
pub(crate) fn files_under(root: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        if !folder.is_dir() {
            continue;
        }
        let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}

/// The newest `GLIBC_2.N` among a program's names of versions, which end with a zero byte.
fn glibc_minor(program: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"GLIBC_2.";
    let starts = program.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME);
    let minors = starts.filter_map(|(at, _)| {
        let rest = program.get(at + NAME.len()..)?;
        // A third number is that of an old version.
        let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        let ends = matches!(rest.get(end), Some(0 | b'.'));
        std::str::from_utf8(rest.get(..end)?).ok()?.parse().ok().filter(|_| ends)
    });
    minors.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_glibc_is_found() {
        let program = b"\x7fELF\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_2.99 is text\0";
        assert_eq!(glibc_minor(program), Some(34));
        assert_eq!(glibc_minor(b"static GLIBC_2."), None);
    }

    #[test]
    fn a_fresh_folder_has_only_what_was_put_there() {
        let around = tempfile::tempdir().expect("a folder");
        let root = around.path().join("kit");
        let first = Folder::fresh(root.clone()).expect("made");
        first.write("bin/old", "old", true).expect("written");
        let second = Folder::fresh(root).expect("made anew");
        second.write("run.sh", "#!/bin/sh\n", true).expect("written");
        second.copy(&second.root.join("run.sh"), "a/b/copy").expect("copied");
        let files = second.files().expect("listed");
        assert_eq!(files, [("a/b/copy".to_owned(), 10), ("run.sh".to_owned(), 10)]);
        assert_eq!(second.glibc_minor(), Ok(None));
    }
}
