//! `cargo xtask mutants`: one-line bugs, planted one at a time in a copy of the workspace; the simulation must find
//! each of them. Not mutation testing of every line, and not hooks in the code under test: what ships is what is
//! mutated. Invariant: the working tree is never touched, and a bug whose place is gone is an error, not a pass.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{fs, io};

use crate::tally::{Report, Tally};
use crate::workspace::Workspace;

/// Seeds in which a planted bug has to be found: as many as one test run simulates.
pub(crate) const SEEDS: u64 = crate::steps::SIMULATION_SEEDS;

/// A planted bug.
struct Mutant {
    /// What is wrong with it, in words.
    what: &'static str,
    /// The file, from the workspace's root.
    file: &'static str,
    /// Stands there exactly once.
    find: &'static str,
    replace: &'static str,
}

const MUTANTS: &[Mutant] = &[
    Mutant {
        what: "an object that is withdrawn keeps its generation and its place in the index",
        file: "core/src/engine/room.rs",
        find: "            self.out.push(Action::Withdraw { slot });",
        replace: "            let _ = slot;",
    },
    Mutant {
        what: "an object is reused while it is copied to another tier",
        file: "core/src/engine/crossing.rs",
        find: "object.copies += 1;",
        replace: "object.copies += 0;",
    },
    Mutant {
        what: "a link is handed GPU memory that it does not reach",
        file: "core/src/engine/owner.rs",
        find: "(self.key_for(link, extent.segment).is_some() &&",
        replace: "(!self.links.is_empty() &&",
    },
    Mutant {
        what: "the payload of a fabric that stages GPUs is gathered from one",
        file: "core/src/engine/owner.rs",
        find: "!(staged && extent.len_bytes <= inline_max)",
        replace: "!(staged && inline_max == u64::MAX)",
    },
    Mutant {
        what: "an object that has moved is shown in its old place",
        file: "core/src/engine/moves.rs",
        find: "self.out.push(Action::Publish { slot, object: object.published(new) });",
        replace: "let _ = slot;",
    },
    Mutant {
        what: "a move whose copy failed is a success",
        file: "core/src/engine/moves.rs",
        find: "if result.is_err() || !self.is_movable(source) {",
        replace: "if !self.is_movable(source) {",
    },
    Mutant {
        what: "the old place of an object that has moved is free at once",
        file: "core/src/engine/moves.rs",
        find: "        self.eviction.forget(from, old);\n",
        replace: "        self.eviction.forget(from, old);\n        self.free_object(old);\n",
    },
    Mutant {
        what: "an object that was moved at seal is still said to be in the tier that it came from",
        file: "core/src/engine/puts.rs",
        find: "object.tier = self.space.tier(to.segment);",
        replace: "let _ = to.segment;",
    },
    Mutant {
        what: "an extent is reused before its leases end",
        file: "core/src/engine/objects.rs",
        find: "self.leases == 0 && self.sends == 0",
        replace: "self.sends == 0",
    },
    Mutant {
        what: "a lease is not counted when it is granted",
        file: "core/src/engine/owner.rs",
        find: "object.leases += 1;",
        replace: "object.leases += 0;",
    },
    Mutant {
        what: "an extent is reused while it is being sent",
        file: "core/src/engine/objects.rs",
        find: "self.leases == 0 && self.sends == 0",
        replace: "self.leases == 0",
    },
    Mutant {
        what: "the lease is counted from the grant, not from before the question",
        file: "core/src/engine/arrival.rs",
        find: "let valid_until = at.after_ms(",
        replace: "let valid_until = self.now.after_ms(",
    },
    Mutant {
        what: "a read that ended after its lease is a success",
        file: "core/src/engine/arrival.rs",
        find: "Ok(ReadEnd { moved, .. }) if self.now <= valid_until =>",
        replace: "Ok(ReadEnd { moved, .. }) if self.now <= valid_until || link.0 < u64::MAX =>",
    },
    Mutant {
        what: "a generation word that has changed is believed",
        file: "core/src/engine/locations.rs",
        find: "Ok(ReadEnd { word, round_trips, .. }) if *word == Some(location.generation.0) => {",
        replace: "Ok(ReadEnd { word, round_trips, .. }) if word.is_some() => {",
    },
    Mutant {
        what: "a place that was read without a lease is believed without a look at the word",
        file: "core/src/engine/locations.rs",
        find: "Ok(ReadEnd { word, moved, .. }) if *word == Some(location.generation.0) => {",
        replace: "Ok(ReadEnd { word, moved, .. }) if word.is_some() => {",
    },
    Mutant {
        what: "clients' pins are forgotten",
        file: "core/src/engine/room.rs",
        find: ".filter(|generation| !pinned.contains(*generation))",
        replace: ".filter(|generation| !pinned.contains(*generation) || generation.0 > 0)",
    },
    Mutant {
        what: "an object is freed as soon as it is withdrawn",
        file: "core/src/engine/room.rs",
        find: "        self.timers.set(self.now.after_ms(DRAIN_MS), Timer::Drain);\n        true\n    }\n\n    pub(super) fn drain_again",
        replace: "        self.free_object(generation);\n        true\n    }\n\n    pub(super) fn drain_again",
    },
    Mutant {
        what: "an extent is freed while bytes may still land in it",
        file: "core/src/engine/fetch/setbacks.rs",
        find: "self.out.push(Action::CancelRead { transfer });",
        replace: "if let Some((filled, _)) = self.transfers.remove(&transfer) { self.free_object(filled); }\n                self.out.push(Action::CancelRead { transfer });",
    },
    Mutant {
        what: "the bytes of one item of a payload land at the place of another",
        file: "transport/src/payload.rs",
        find: "part(self.number, self.done, step);",
        replace: "part(self.number, self.done.min(0), step);",
    },
    Mutant {
        what: "of several objects in one send only the first is held in place",
        file: "core/src/engine/outgoing.rs",
        find: "        if let Some((_, generation)) = payload\n            && let Some(object)",
        replace: "        if let Some((_, generation)) = payload\n            && !self.outgoing.0.contains_key(&link)\n            && let Some(object)",
    },
    Mutant {
        what: "a send of several objects lets go of the first of them only",
        file: "core/src/engine/owner.rs",
        find: "self.sends.remove(&send).unwrap_or_default() {",
        replace: "self.sends.remove(&send).unwrap_or_default().into_iter().take(1) {",
    },
    Mutant {
        what: "a part of a payload is given a place when its frame is gone",
        file: "core/src/engine/arrival.rs",
        find: "if self.payload_at_hand == Some(landing) || extent.len_bytes == 0 =>",
        replace: "if landing.0 < u64::MAX || extent.len_bytes == 0 =>",
    },
    Mutant {
        what: "a copy that was under way brings a deleted object back",
        file: "core/src/engine/delete.rs",
        find: "            self.deleted.insert(*object);",
        replace: "            let _ = object;",
    },
    Mutant {
        what: "a copy is evicted though the node that had the original is gone",
        file: "core/src/engine/replicas.rs",
        find: "object.role == Role::Copy && lasting.iter().all(|(node, epoch)| self.is_alive(*node, *epoch))",
        replace: "object.role == Role::Copy && !lasting.is_empty()",
    },
    Mutant {
        what: "a client that dies leaves its reservations behind",
        file: "core/src/engine/local.rs",
        find: "            self.abort(reservation);\n        }\n        self.forget_waits_of",
        replace: "            let _ = reservation;\n        }\n        self.forget_waits_of",
    },
    Mutant {
        what: "memory granted ahead is free again although a put is under way in it",
        file: "core/src/engine/ahead.rs",
        find: "until <= ring.tail",
        replace: "until < u64::MAX",
    },
    Mutant {
        what: "no slot of the index is kept for what is put without asking",
        file: "core/src/engine/ahead.rs",
        find: "        self.objects.keep_slots(objects);\n",
        replace: "",
    },
    Mutant {
        what: "what was published in a chunk is given back with the rest of it",
        file: "core/src/engine/ahead.rs",
        find: "chunk.holes.insert(end, hole_end - end);",
        replace: "chunk.holes.insert(put.offset, hole_end - put.offset);",
    },
    Mutant {
        what: "a node announces nothing to a directory that has started again",
        file: "core/src/engine/keeper.rs",
        find: "        self.announce_all(link);",
        replace: "",
    },
    Mutant {
        what: "\"no such object\" is said before everyone was asked",
        file: "core/src/engine/known.rs",
        find: "        if links.is_empty() {\n            return self.ask_over(operation);",
        replace: "        if links.len() < usize::MAX {\n            return self.ask_over(operation);",
    },
    Mutant {
        what: "a replica may go like a copy",
        file: "core/src/engine/replicas.rs",
        find: "object.role == Role::Copy && lasting.iter()",
        replace: "object.role != Role::Original && lasting.iter()",
    },
    Mutant {
        what: "a replica counts as held before it is fetched",
        file: "core/src/engine/replicas.rs",
        find: "        self.fetch_from_any(FetchFor::Replica(Box::new(asked)), key, scope, timeout_ms, holders);",
        replace: "        self.replica_answer(&asked, Ok(()));\n        self.fetch_from_any(FetchFor::Replica(Box::new(asked)), key, scope, timeout_ms, holders);",
    },
    Mutant {
        what: "announcements do not say on how many nodes an object is to be",
        file: "core/src/engine/objects.rs",
        find: "            replicas: self.replicas,",
        replace: "            replicas: self.replicas.min(1),",
    },
    Mutant {
        what: "one replica more than is too much may go",
        file: "core/src/engine/repair.rs",
        find: "lasting.split_off(wanted.max(originals))",
        replace: "lasting.split_off((wanted - 1).max(originals))",
    },
    Mutant {
        what: "what a lost node held is not made anew",
        file: "core/src/engine/directory.rs",
        find: "            self.changed.insert(key.clone());",
        replace: "            let _ = key;",
    },
    Mutant {
        what: "who takes the directory over forgets what was deleted",
        file: "core/src/engine/keeper.rs",
        find: "Directory::after(self.deleted.clone())",
        replace: "Directory::default()",
    },
    Mutant {
        what: "two nodes go on keeping a directory each",
        file: "core/src/engine/keeper.rs",
        find: "            self.hand_over(link);",
        replace: "",
    },
];

/// Plants every bug whose words contain `only`, and looks for it.
pub(crate) fn mutants(workspace: &Workspace, only: Option<&str>) -> Result<Report, String> {
    let chosen: Vec<&Mutant> =
        MUTANTS.iter().filter(|mutant| only.is_none_or(|only| mutant.what.contains(only))).collect();
    if chosen.is_empty() {
        return Err(format!("no planted bug says {:?}", only.unwrap_or_default()));
    }
    let copy = Copy::of(workspace)?;
    // Without this, a copy that finds bugs where there are none would pass for a sharp one.
    if copy.finds_a_bug(SEEDS / 10)?.is_some() {
        return Err("the simulation fails without any planted bug".to_owned());
    }
    let mut tally = Tally::default();
    for mutant in chosen {
        let started = Instant::now();
        let found = copy.with(mutant, || copy.finds_a_bug(SEEDS))?;
        match &found {
            Some(_) => tally.passed += 1,
            None => tally.failed += 1,
        }
        let verdict = found.unwrap_or_else(|| format!("NOT FOUND in {SEEDS} seeds"));
        println!("{:5.0} s  {}: {verdict}", started.elapsed().as_secs_f64(), mutant.what);
    }
    Ok(Report {
        tally,
        note: format!("{} of {} planted bugs found", tally.passed, tally.passed + tally.failed),
    })
}

/// A copy of the workspace, built into a folder of its own.
struct Copy {
    root: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// Brings the copy up to date. Files that did not change keep their time, so that little is built again.
    fn of(workspace: &Workspace) -> Result<Self, String> {
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let listed = git.current_dir(&workspace.root).stderr(Stdio::inherit()).output();
        let listed = listed.map_err(|error| format!("git ls-files: {error}"))?;
        if !listed.status.success() {
            return Err("git ls-files failed: the planted bugs need a git checkout to copy".to_owned());
        }
        let copy = Self {
            root: workspace.target.join("mutants/tree"),
            target: workspace.target.join("mutants/target"),
        };
        for name in String::from_utf8_lossy(&listed.stdout).split_terminator('\0') {
            let (from, to) = (workspace.root.join(name), copy.root.join(name));
            if from.is_file() {
                bring(&from, &to).map_err(|error| format!("{name}: {error}"))?;
            }
        }
        Ok(copy)
    }

    /// Runs `check` with the bug in place, and takes it out again.
    fn with<T>(&self, mutant: &Mutant, check: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        let path = self.root.join(mutant.file);
        let failed = |error: io::Error| format!("{}: {error}", mutant.file);
        let whole = fs::read_to_string(&path).map_err(failed)?;
        fs::write(&path, mutant.plant(&whole)?).map_err(failed)?;
        let result = check();
        fs::write(&path, whole).map_err(failed)?;
        result.map_err(|why| format!("{}: {why}", mutant.what))
    }

    /// Builds and runs the simulation until the first seed that fails. Returns its line.
    fn finds_a_bug(&self, seeds: u64) -> Result<Option<String>, String> {
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--release", "--package", "hetmem-tests", "--bin", "simulate"]);
        build.current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        // Built often, with one line changed, and run briefly: that is a tenth of the time incrementally. With assertions:
        // the engine's own count as finding it.
        build.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "64");
        build.env("CARGO_PROFILE_RELEASE_INCREMENTAL", "true");
        build.env("CARGO_PROFILE_RELEASE_DEBUG", "0").env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
        let built = build.status().map_err(|error| format!("cargo build: {error}"))?;
        if !built.success() {
            return Err(format!("cargo build ended with {built}"));
        }
        let program = self.target.join("release/simulate");
        let mut simulate = Command::new(&program);
        simulate.args(["--seeds", &seeds.to_string(), "--failures", "1"]).stderr(Stdio::null());
        let output = simulate.output().map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find(|line| line.starts_with("seed ") && line.contains(" FAILED "));
        match (output.status.code(), line) {
            (Some(0), None) => Ok(None),
            (Some(1), Some(line)) => Ok(Some(line.chars().take(200).collect())),
            (code, _) => Err(format!("the simulation ended with {code:?}: {}", text.trim_end())),
        }
    }
}

impl Mutant {
    fn plant(&self, whole: &str) -> Result<String, String> {
        match whole.matches(self.find).count() {
            1 => Ok(whole.replacen(self.find, self.replace, 1)),
            count => Err(format!("{}: {:?} stands there {count} times, not once", self.file, self.find)),
        }
    }
}

fn bring(from: &Path, to: &Path) -> io::Result<()> {
    let bytes = fs::read(from)?;
    if fs::read(to).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(to, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_planted_bug_has_its_place() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for mutant in MUTANTS {
            let whole = fs::read_to_string(root.join(mutant.file)).expect("the file is there");
            let planted = mutant.plant(&whole).expect("its place is there once");
            assert_ne!(planted, whole, "{}", mutant.what);
        }
    }
}
