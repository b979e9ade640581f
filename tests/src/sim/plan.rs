//! What a seed means: the cluster's shape, the network's manners, and which faults come. Not when: that is drawn on
//! the way. Invariant: a plan is a function of its seed alone.

use hetmem_core::Tier;
use hetmem_transport::SimFaults;

use super::rng::Rng;

pub(super) const MS: u64 = 1_000_000;

/// What may happen to the cluster beside what clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weather {
    /// Nothing: every promise can be checked to the letter.
    Calm,
    /// The network is rough, but nobody is lost.
    Rough,
    /// Nodes stop hearing each other for moments, too short for anyone to be lost.
    Stalls,
    /// Links break.
    Cuts,
    /// Nodes stop hearing each other for a while.
    Partitions,
    /// Nodes die and start again.
    Deaths,
    /// Nodes die one at a time, each when what the one before took along was made anew; others are away for a while.
    Losses,
    /// All of it.
    Storm,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) weather: Weather,
    pub(super) nodes: usize,
    /// How many of them may keep the directory; if one alone, it is not named in its own list.
    pub(super) heirs: usize,
    /// Of a hundred puts, how many are to be on several nodes.
    pub(super) replicated: u64,
    pub(super) clients_per_node: u64,
    pub(super) keys: usize,
    pub(super) capacity_bytes: u64,
    pub(super) quota_bytes: u64,
    pub(super) objects_max: u32,
    pub(super) threshold_bytes: Option<u64>,
    pub(super) lease_ms: u32,
    /// The longest object, in bytes.
    pub(super) len_max: u64,
    /// For how long clients work, in nanoseconds.
    pub(super) busy_ns: u64,
    /// The longest pause between two operations of a client, in nanoseconds.
    pub(super) pause_ns: u64,
    /// The longest pause between two faults, in nanoseconds.
    pub(super) fault_pause_ns: u64,
    pub(super) segment_failures: u64,
    pub(super) copy_failures: u64,
    /// Of a hundred clients, how many die in the middle of their work.
    pub(super) client_deaths: u64,
    /// Pins of one client's page.
    pub(super) pins: usize,
    /// GPU tiers of each node, the bytes of each, and whether the fabric reaches them, and then by way of host memory.
    pub(super) gpus: u16,
    pub(super) gpu_bytes: u64,
    pub(super) gpus_reached: bool,
    pub(super) stages_gpus: bool,
    /// How often deletes and puts come, which decides how full nodes are.
    pub(super) deletes: u64,
    pub(super) puts: u64,
    pub(super) network: SimFaults,
    /// The most that a clock differs from true time, in parts of a million.
    pub(super) clock_ppm: u64,
    /// Of a hundred completions, how many are reported twice.
    pub(super) repeats: u64,
}

/// Of so many objects, some are granted ahead while there are few, and lacking when there are many.
const FEW_AHEAD: u32 = 36;

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed_0f0e_c105_7e55);
        let weather = rng.weighted(&[
            (20, Weather::Calm),
            (20, Weather::Rough),
            (20, Weather::Stalls),
            (10, Weather::Cuts),
            (10, Weather::Partitions),
            (10, Weather::Deaths),
            (7, Weather::Losses),
            (10, Weather::Storm),
        ]);
        let network = network(&mut rng, weather);
        let one_way_ms = (network.delay_ns.1 + network.jitter_ns).div_ceil(MS);
        let lease = rng.pick(&[15, 40, 300, 2_000]).max(6 * one_way_ms);
        let capacity_bytes = rng.pick(&[512_u64, 768, 1_024, 2_048, 4_096]) << 10;
        let losses = weather == Weather::Losses;
        let nodes = rng.weighted(&[(45, 3), (25, 4), (15, 5), (10, 6), (5, 7)]) + if losses { 1 } else { 0 };
        // Drawn apart: what else a seed means does not depend on it.
        let mut gpus = Rng::new(seed ^ 0x9b0c_0a11_7135_5eed);
        let objects_max = rng.weighted(if losses {
            &[(35, 6), (10, 16), (5, FEW_AHEAD), (50, 256)]
        } else {
            &[(15, 6), (15, 16), (10, FEW_AHEAD), (60, 256)]
        });
        let mut plan = Self {
            weather,
            nodes,
            heirs: rng.weighted(&[(55, 1), (25, 2), (20, 3)]),
            replicated: rng.pick(&[0, 10, 40]).max(if losses { 30 } else { 0 }),
            clients_per_node: if losses { 1 } else { rng.between(1, 4) },
            // More than there is room for, where the room is that for a few puts ahead.
            keys: if objects_max == FEW_AHEAD { 64 } else { rng.pick(&[3, 8, 16, 40]) },
            capacity_bytes,
            quota_bytes: rng.pick(&[0, capacity_bytes / 4, capacity_bytes / 2]),
            objects_max,
            threshold_bytes: rng.pick(&[Some(0), Some(0), Some(1_024), Some(8_192), None, Some(u64::MAX)]),
            lease_ms: u32::try_from(lease).unwrap_or(u32::MAX),
            // Long objects cost time and find little that shorter ones do not.
            len_max: rng
                .weighted(&[(35, 200), (35, 2_000), (25, 20_000), (5, 100_000)])
                .min(capacity_bytes / 4),
            busy_ns: if losses {
                rng.between(8_000, 20_000) * MS
            } else {
                rng.weighted(&[(60, 500), (30, 1_500), (10, 6_000)]) * MS / 100 * rng.between(50, 100)
            },
            pause_ns: if losses { 200 * MS } else { rng.pick(&[MS / 2, 3 * MS, 10 * MS]) },
            fault_pause_ns: if weather == Weather::Stalls {
                100 * MS
            } else {
                rng.pick(&[300, 700, 2_500]) * MS
            },
            segment_failures: rng.pick(&[0, 0, 10, 50]),
            copy_failures: rng.pick(&[0, 0, 20]),
            client_deaths: rng.pick(&[0, 50, 100]),
            pins: rng.pick(&[2, 8]),
            deletes: if objects_max == FEW_AHEAD { 0 } else { rng.pick(&[0, 2, 8, 15]) },
            puts: if objects_max == FEW_AHEAD { 60 } else { rng.pick(&[20, 35, 60]) },
            gpus: gpus.weighted(&[(60, 0), (20, 1), (20, 2)]),
            gpu_bytes: gpus.pick(&[64_u64, 256, 1_024]) << 10,
            gpus_reached: gpus.percent(50),
            stages_gpus: gpus.percent(50),
            network,
            clock_ppm: rng.pick(&[0, 20_000, 50_000]),
            repeats: if weather == Weather::Calm { 0 } else { rng.pick(&[0, 5, 30]) },
        };
        // Drawn apart, too.
        if Rng::new(seed ^ 0xde1e_7ed0_bec7_0555).percent(3) {
            plan.let_deletes_overtake_reads();
        }
        plan
    }

    /// Few objects, read and deleted all the while, and most completions late: what is read is deleted meanwhile.
    fn let_deletes_overtake_reads(&mut self) {
        (self.keys, self.deletes) = (3, 15);
        self.threshold_bytes = Some(0);
        self.lease_ms = self.lease_ms.max(300);
        (self.network.late_chance, self.network.late_ns) = (700_000, 60 * MS);
    }

    /// The GPU tiers that the fabric reaches.
    pub(super) fn reached(&self) -> Vec<Tier> {
        (0..self.gpus).filter(|_| self.gpus_reached).map(Tier::Gpu).collect()
    }

    /// Whether a lost link is the weather's doing.
    pub(super) fn breaks_links(&self) -> bool {
        !matches!(self.weather, Weather::Calm | Weather::Rough | Weather::Stalls)
    }
}

fn network(rng: &mut Rng, weather: Weather) -> SimFaults {
    let mut network = if weather == Weather::Calm { SimFaults::none() } else { SimFaults::default() };
    network.delay_ns = rng.pick(&[(5_000, 50_000), (20_000, 2 * MS), (MS, 20 * MS)]);
    network.jitter_ns = rng.pick(&[0, 20_000, MS / 2, 5 * MS]);
    network.pieces_max = rng.pick(&[1, 3, 8]);
    network.connect_timeout_ns = 1_000 * MS;
    if weather != Weather::Calm {
        network.late_chance = rng.pick(&[0, 20_000, 100_000]);
        network.late_ns = rng.pick(&[2 * MS, 20 * MS, 60 * MS]);
        network.busy_chance = rng.pick(&[0, 20_000, 200_000]);
    }
    network.detect_ns = rng.pick(&[(MS, 50 * MS), (MS, 400 * MS)]);
    network.gather_max = rng.pick(&[1, 2, 5, 1_024]);
    network.immediate_chance = rng.pick(&[0, 500_000, 1_000_000]);
    network
}
