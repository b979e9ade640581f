//! Modules: PTX texts and the functions in them. Not a compiler: nothing runs yet. Invariant: a function can be looked up
//! exactly if the text has an `.entry` of its name.

use crate::code::{Code, Outcome};

#[derive(Debug)]
pub(crate) struct Module {
    /// The ordinal of the context's device.
    pub(crate) device: usize,
    text: String,
}

#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) device: usize,
    pub(crate) name: String,
}

/// Does on the CPU what a kernel does.
type Twin = fn(&Launch) -> Outcome;

/// The kernels that can run, by name: none yet.
const TWINS: &[(&str, Twin)] = &[];

/// A kernel that was started. The seam for twins: `new` is to copy out of C what the kernel is started with, before the
/// caller goes on; `carry_out` runs on the stream's worker.
#[derive(Debug)]
pub(crate) struct Launch {
    twin: Twin,
}

impl Module {
    /// From PTX text.
    ///
    /// # Errors
    /// `NO_BINARY_FOR_GPU` for compiled code, `INVALID_PTX` for text that is no PTX.
    pub(crate) fn load(device: usize, image: Vec<u8>) -> Outcome<Self> {
        const FATBIN: &[u8] = &[0x50, 0xED, 0x55, 0xBA];
        if image.starts_with(b"\x7FELF") || image.starts_with(FATBIN) {
            return Err(Code::NO_BINARY_FOR_GPU);
        }
        let text = String::from_utf8(image).map_err(|_| Code::INVALID_PTX)?;
        let has = |directive: &str| text.lines().any(|line| line.trim_start().starts_with(directive));
        if !has(".version") || !has(".target") {
            return Err(Code::INVALID_PTX);
        }
        Ok(Self { device, text })
    }

    /// # Errors
    /// `NOT_FOUND`.
    pub(crate) fn function(&self, name: &str) -> Outcome<Function> {
        let mut entries = self.text.split(".entry").skip(1);
        let is_there = entries.any(|rest| {
            let after = rest.trim_start().strip_prefix(name).map(str::trim_start);
            after.is_some_and(|after| after.starts_with('('))
        });
        if !is_there || name.is_empty() {
            return Err(Code::NOT_FOUND);
        }
        Ok(Function { device: self.device, name: name.to_owned() })
    }
}

impl Launch {
    /// # Errors
    /// `NOT_SUPPORTED` for a kernel without a twin.
    pub(crate) fn new(function: &Function) -> Outcome<Self> {
        let mut twins = TWINS.iter();
        let twin = twins.find(|(name, _)| *name == function.name).map(|(_, twin)| *twin);
        Ok(Self { twin: twin.ok_or(Code::NOT_SUPPORTED)? })
    }

    /// # Errors
    /// What the twin ends with; the context is in that error from then on.
    pub(crate) fn carry_out(&self) -> Outcome {
        (self.twin)(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = ".version 9.0\n.target sm_80\n.visible .entry gather(\n\t.param .u64 a\n)\n{ ret; }\n\
                       .visible .entry scatter_all (\n)\n{ ret; }\n";

    #[test]
    fn functions_are_found_by_their_whole_name() {
        let module = Module::load(0, PTX.as_bytes().to_vec()).expect("PTX");
        for name in ["gather", "scatter_all"] {
            assert_eq!(module.function(name).map(|function| function.name), Ok(name.to_owned()));
        }
        for name in ["gath", "scatter", "ret", ""] {
            assert_eq!(module.function(name).err(), Some(Code::NOT_FOUND), "{name}");
        }
    }

    #[test]
    fn what_is_no_ptx_is_refused() {
        let refused = |image: &[u8]| Module::load(0, image.to_vec()).err();
        assert_eq!(refused(b"\x7FELF\x02"), Some(Code::NO_BINARY_FOR_GPU));
        assert_eq!(refused(b"int main() {}"), Some(Code::INVALID_PTX));
        assert_eq!(refused(b"\xFF\xFE"), Some(Code::INVALID_PTX));
    }
}
