//! Modules: PTX texts and the functions in them; launches of these functions. Not a compiler: a kernel runs as its twin of
//! `hetmem-kernels`. Invariant: a function can be looked up exactly if the text has an `.entry` of its name, and a launch
//! takes as many parameters, of as many bytes each, as that entry says.

use hetmem_kernels::launch::{self, Fault, Memory, Twin};

use crate::abi::PTX_VERSION_MAX;
use crate::code::{Code, Outcome};
use crate::pointers::InParameters;

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
    /// Bytes of each parameter; none for those that no twin takes.
    parameters: Option<Vec<usize>>,
    /// Threads of a block at most, where the entry says so.
    threads_max: Option<u32>,
}

/// A kernel that was started: all that C said of it, copied before the caller goes on. `carry_out` runs on the stream's
/// worker.
#[derive(Debug)]
pub(crate) struct Launch {
    twin: Twin,
    blocks: u32,
    threads: u32,
    parameters: Vec<u64>,
}

/// Blocks of threads, and threads of a block, by dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: [u32; 3],
}

impl Module {
    /// From PTX text.
    ///
    /// # Errors
    /// `NO_BINARY_FOR_GPU` for compiled code, `INVALID_PTX` for text that is no PTX, `UNSUPPORTED_PTX_VERSION` for that of
    /// a newer CUDA than the driver's.
    pub(crate) fn load(device: usize, image: Vec<u8>) -> Outcome<Self> {
        const FATBIN: &[u8] = &[0x50, 0xED, 0x55, 0xBA];
        if image.starts_with(b"\x7FELF") || image.starts_with(FATBIN) {
            return Err(Code::NO_BINARY_FOR_GPU);
        }
        let text = String::from_utf8(image).map_err(|_| Code::INVALID_PTX)?;
        let after = |directive: &str| text.lines().find_map(|line| line.trim_start().strip_prefix(directive));
        let (Some(version), Some(_)) = (after(".version"), after(".target")) else {
            return Err(Code::INVALID_PTX);
        };
        let (major, minor) = version.trim().split_once('.').ok_or(Code::INVALID_PTX)?;
        let number = |digits: &str| digits.parse::<u32>().map_err(|_| Code::INVALID_PTX);
        if (number(major)?, number(minor)?) > PTX_VERSION_MAX {
            return Err(Code::UNSUPPORTED_PTX_VERSION);
        }
        Ok(Self { device, text })
    }

    /// # Errors
    /// `NOT_FOUND`.
    pub(crate) fn function(&self, name: &str) -> Outcome<Function> {
        let mut entries = self.text.split(".entry").skip(1);
        let found = entries.find_map(|rest| {
            let after = rest.trim_start().strip_prefix(name).map(str::trim_start);
            after.and_then(|after| after.strip_prefix('('))
        });
        let Some((parameters, rest)) = found.and_then(|found| found.split_once(')')) else {
            return Err(Code::NOT_FOUND);
        };
        if name.is_empty() {
            return Err(Code::NOT_FOUND);
        }
        Ok(Function {
            device: self.device,
            name: name.to_owned(),
            parameters: parameter_lens(parameters),
            threads_max: threads_max(rest),
        })
    }
}

/// Bytes of each parameter in an entry's list; none if one is not a number of at most 8 bytes.
fn parameter_lens(list: &str) -> Option<Vec<usize>> {
    let parameters = list.split(',').map(str::trim).filter(|parameter| !parameter.is_empty());
    let len = |parameter: &str| {
        let kind = parameter.strip_prefix(".param")?.split_whitespace().next()?;
        let bits: usize = kind.trim_start_matches(['.', 'u', 's', 'b', 'f']).parse().ok()?;
        let is_array = parameter.contains('[');
        ([8, 16, 32, 64].contains(&bits) && !is_array).then_some(bits / 8)
    };
    parameters.map(len).collect()
}

/// What `.maxntid` says, between the parameters and the body.
fn threads_max(rest: &str) -> Option<u32> {
    let directives = rest.split_once('{')?.0;
    let numbers = directives.split_once(".maxntid")?.1.split_once('\n')?.0;
    numbers
        .split(',')
        .map(|number| number.trim().parse::<u32>().ok())
        .try_fold(1, |all, number| Some(all * number?))
}

impl Launch {
    /// # Errors
    /// `INVALID_VALUE` for an empty grid or too many threads, `NOT_SUPPORTED` for a kernel without a twin or a grid of
    /// more than one dimension.
    pub(crate) fn new(function: &Function, grid: Grid, parameters: InParameters) -> Outcome<Self> {
        let Grid { blocks: [blocks, blocks_y, blocks_z], threads: [threads, threads_y, threads_z] } = grid;
        let all_threads = u64::from(threads) * u64::from(threads_y) * u64::from(threads_z);
        if all_threads == 0 || all_threads > u64::from(function.threads_max.unwrap_or(1024)) {
            return Err(Code::INVALID_VALUE);
        }
        // cuda.h: the first dimension has 31 bits, the others 16.
        if blocks == 0
            || blocks > 0x7fff_ffff
            || [blocks_y, blocks_z].iter().any(|n| !(1..0x1_0000).contains(n))
        {
            return Err(Code::INVALID_VALUE);
        }
        let (Some(twin), Some(lens)) = (launch::twin(&function.name), &function.parameters) else {
            return Err(Code::NOT_SUPPORTED);
        };
        if [blocks_y, blocks_z, threads_y, threads_z] != [1; 4] {
            return Err(Code::NOT_SUPPORTED);
        }
        Ok(Self { twin, blocks, threads, parameters: parameters.get_all(lens)? })
    }

    /// # Errors
    /// What the device stops at; the context is in that error from then on.
    pub(crate) fn carry_out(&self, memory: &mut dyn Memory) -> Outcome {
        let Self { twin, blocks, threads, ref parameters } = *self;
        twin(memory, &launch::Launch { blocks, threads, parameters }).map_err(|fault| match fault {
            Fault::Address { .. } => Code::ILLEGAL_ADDRESS,
            Fault::Misaligned { .. } => Code::MISALIGNED_ADDRESS,
            Fault::Shape => Code::LAUNCH_FAILED,
        })
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
    fn entries_say_what_they_take() {
        let text = ".version 9.0\n.target sm_80\n.visible .entry some(\n\t.param .u64 a,\n\t.param .b32 b,\n\
                    \t.param .f32 c\n)\n.maxntid 128, 1, 1\n{ ret; }\n.entry other(.param .align 8 .b8 a[24]) { ret; }\n";
        let module = Module::load(0, text.as_bytes().to_vec()).expect("PTX");
        let some = module.function("some").expect("there");
        assert_eq!((some.parameters, some.threads_max), (Some(vec![8, 4, 4]), Some(128)));
        let other = module.function("other").expect("there");
        assert_eq!((other.parameters, other.threads_max), (None, None));
    }

    /// Each kernel of the store is found in its PTX, and takes numbers only. Renamed there, it is not found any more.
    #[test]
    fn the_store_s_kernels_can_be_launched() {
        for ptx in hetmem_kernels::ptx::MODULES {
            let module = Module::load(0, ptx.text.as_bytes().to_vec()).expect("PTX");
            for name in ptx.entries {
                let function = module.function(name).expect("there");
                assert!(function.parameters.is_some_and(|lens| lens.iter().all(|len| *len == 8)), "{name}");
                assert!(function.threads_max.is_some() && launch::twin(name).is_some(), "{name}");
                let renamed = ptx.text.replace(name, "hetmem_renamed");
                let renamed = Module::load(0, renamed.into_bytes()).expect("PTX");
                assert_eq!(renamed.function(name).err(), Some(Code::NOT_FOUND), "{name}");
            }
        }
    }

    #[test]
    fn what_is_no_ptx_is_refused() {
        let refused = |image: &[u8]| Module::load(0, image.to_vec()).err();
        assert_eq!(refused(b"\x7FELF\x02"), Some(Code::NO_BINARY_FOR_GPU));
        assert_eq!(refused(b"int main() {}"), Some(Code::INVALID_PTX));
        assert_eq!(refused(b"\xFF\xFE"), Some(Code::INVALID_PTX));
        assert_eq!(refused(b".version nine\n.target sm_80\n"), Some(Code::INVALID_PTX));
        assert_eq!(refused(b".version 9.1\n.target sm_80\n"), Some(Code::UNSUPPORTED_PTX_VERSION));
    }
}
