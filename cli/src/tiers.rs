//! In which tier a command's objects are wanted: `--tier` and `--or-host`. Not the tiers of the node, which `hetmem status`
//! lists. Invariant: without `--tier` nothing is said of tiers.

use hetmem_client::{Tier, TierHint};

/// Where the objects are to be.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
// The commands that flatten this have an argument group of the type's name already.
#[group(id = "tiers")]
pub(crate) struct Args {
    /// In which tier of this node the objects are to be: host, or gpu:N
    #[arg(long, value_name = "TIER")]
    tier: Option<Tier>,
    /// Host memory will do if the node has no such GPU, or no room on it; the receipt says where the objects are
    #[arg(long, requires = "tier")]
    or_host: bool,
}

impl Args {
    pub(crate) fn hint(self) -> Option<TierHint> {
        self.tier.map(|tier| TierHint { tier, or_host: self.or_host })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        tiers: Args,
    }

    fn hint(line: &[&str]) -> Result<Option<TierHint>, String> {
        let line = Line::try_parse_from([&["hetmem"], line].concat());
        line.map(|line| line.tiers.hint()).map_err(|error| error.to_string())
    }

    #[test]
    fn tiers_are_read_and_wrong_ones_are_named() {
        assert_eq!(hint(&[]), Ok(None));
        assert_eq!(hint(&["--tier", "host"]), Ok(Some(Tier::Host.into())));
        assert_eq!(hint(&["--tier", "gpu:1"]), Ok(Some(Tier::Gpu(1).into())));
        let or_host = TierHint { tier: Tier::Gpu(0), or_host: true };
        assert_eq!(hint(&["--or-host", "--tier", "gpu:0"]), Ok(Some(or_host)));
        for wrong in ["gpu", "gpu:-1", "gpu:70000", "cuda:0", "Host", ""] {
            let said = hint(&["--tier", wrong]).expect_err("no tier");
            assert!(said.contains("neither host nor gpu:N"), "{said}");
        }
        assert!(hint(&["--or-host"]).expect_err("of what?").contains("--tier"));
    }
}
