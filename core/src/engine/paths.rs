//! What the ways of a get cost with each peer, as measured by this engine's own gets, and the lengths at which one way
//! becomes better than another. Not which way one get takes beyond that. Invariant: a threshold that was computed is
//! at most [`THRESHOLD_MAX`], that of a grant at least [`THRESHOLD_MIN`], and moves only by more than the noise.
//!
//! There are three ways: inside the answer (eager), by read after a grant, and by read of a place that is known. With
//! each, time grows with length: `t = base + length * cost of a byte`. A grant costs one round trip more than an answer
//! with the bytes inside, and spares the copies that such an answer needs; a read of a known place costs no message to the
//! owner's engine. Where two lines cross is a threshold: `(a_read - a_eager) / (b_eager - b_read)`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::fetch::{Fetch, FetchId};
use super::timer::Time;
use super::{Engine, THRESHOLD_DEFAULT};
use crate::receipt::Moved;
use crate::tier::{LinkId, NodeId};

/// The least threshold that is computed for a grant, which is as long as an answer with a shorter object. A read of a known
/// place has no such message: there it is 0.
pub const THRESHOLD_MIN: u64 = 1 << 10;
/// The greatest: beyond it a message would hold up those behind it.
pub const THRESHOLD_MAX: u64 = 256 << 10;

/// Lengths are measured in classes of powers of two; shorter and longer ones say nothing about the crossing.
const CLASS_MIN: u32 = 8;
const CLASSES: usize = 12;
/// Samples of a class and path that are kept; their median stands for them.
const SAMPLES: usize = 15;
/// A median of fewer says little.
const SAMPLES_MIN: usize = 3;
/// One question in so many names four times the threshold, another a quarter of it: objects of a length in between
/// then come by the other path, so that both stay measured. Of gets whose lengths lie elsewhere nothing changes.
const EXPLORE_EVERY: u32 = 16;
/// The same until there is a first threshold.
const EXPLORE_EVERY_AT_FIRST: u32 = 4;
/// A new threshold takes the place of the old one only if it differs by more than this factor.
const HYSTERESIS: f64 = 1.3;

/// A fetch whose question is being timed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    asked: Time,
    /// When the answer came. Where there was no room then, the time says nothing about the path.
    answered: Option<Time>,
}

/// Nanoseconds over bytes: `base + per_byte * length`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    base: f64,
    per_byte: f64,
}

/// The latest gets of one path, by class of length: lengths in bytes, times in nanoseconds.
#[derive(Debug)]
struct Times([VecDeque<(u64, u64)>; CLASSES]);

impl Default for Times {
    fn default() -> Self {
        Self(std::array::from_fn(|_| VecDeque::new()))
    }
}

impl Times {
    fn add(&mut self, len_bytes: u64, ns: u64) {
        let class = len_bytes.checked_ilog2().and_then(|log| log.checked_sub(CLASS_MIN));
        let Some(samples) = class.and_then(|class| self.0.get_mut(usize::try_from(class).ok()?)) else {
            return;
        };
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back((len_bytes, ns.max(1)));
    }

    /// Of each class that has enough samples the one whose time is the median: its length and time.
    fn medians(&self) -> [Option<(f64, f64)>; CLASSES] {
        std::array::from_fn(|class| {
            let mut sorted: Vec<(u64, u64)> = self.0[class].iter().copied().collect();
            if sorted.len() < SAMPLES_MIN {
                return None;
            }
            sorted.sort_unstable_by_key(|(_, ns)| *ns);
            let (len_bytes, ns) = sorted[sorted.len() / 2];
            Some((float(len_bytes), float(ns)))
        })
    }
}

#[allow(clippy::cast_precision_loss, reason = "an estimate")]
fn float(value: u64) -> f64 {
    value as f64
}

/// The lines of two ways, from the classes of length in which both were measured: those with the least sum of squared
/// relative errors, a class having the same weight in both. Whatever made all gets of one class slower while it was
/// measured, such as a busy machine, then moves both lines alike, and not where they cross. None for fewer than two
/// classes.
fn fit_both(one: &Times, other: &Times) -> Option<(Line, Line)> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (one, other) in one.medians().into_iter().zip(other.medians()) {
        if let (Some(one), Some(other)) = (one, other) {
            let weight = 1.0 / (one.1 * other.1);
            first.push((weight, one));
            second.push((weight, other));
        }
    }
    Some((fit(&first)?, fit(&second)?))
}

/// The line with the least sum of squared errors of these weights; none for fewer than two lengths.
fn fit(points: &[(f64, (f64, f64))]) -> Option<Line> {
    let (mut w, mut wx, mut wy, mut wxx, mut wxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for &(weight, (x, y)) in points {
        w += weight;
        wx += weight * x;
        wy += weight * y;
        wxx += weight * x * x;
        wxy += weight * x * y;
    }
    let spread = w * wxx - wx * wx;
    if points.len() < 2 || spread <= f64::EPSILON * w * wxx {
        return None;
    }
    let per_byte = (w * wxy - wx * wy) / spread;
    Some(Line { base: (wy - per_byte * wx) / w, per_byte })
}

/// Where reading becomes the faster of the two, in bytes, but not below `least`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn crossing(eager: Line, read: Line, least: u64) -> u64 {
    let round_trip = read.base - eager.base;
    let copy = eager.per_byte - read.per_byte;
    if round_trip <= 0.0 {
        return least;
    }
    if copy <= 0.0 {
        return THRESHOLD_MAX;
    }
    (round_trip / copy).clamp(float(least), float(THRESHOLD_MAX)) as u64
}

/// How the bytes of a get come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Inside the answer.
    Eager,
    /// By read, after a grant.
    Granted,
    /// By read of a place that is known.
    Known,
}

/// One way of reading beside the eager way.
#[derive(Debug)]
struct Beside {
    /// The least threshold.
    least: u64,
    times: Times,
    questions: u32,
    /// The threshold in bytes, and the lines that it follows from.
    computed: Option<(u64, Line, Line)>,
}

impl Beside {
    fn new(least: u64) -> Self {
        Self { least, times: Times::default(), questions: 0, computed: None }
    }

    fn threshold(&self) -> u64 {
        self.computed.map_or(THRESHOLD_DEFAULT, |(threshold, ..)| threshold)
    }

    /// What the next get goes by.
    fn next(&mut self) -> u64 {
        let every = if self.computed.is_some() { EXPLORE_EVERY } else { EXPLORE_EVERY_AT_FIRST };
        self.questions = self.questions.wrapping_add(1);
        let threshold = self.threshold();
        match self.questions % every {
            0 => (threshold * 4).clamp(THRESHOLD_MIN, THRESHOLD_MAX),
            turn if turn == every / 2 => threshold / 4,
            _ => threshold,
        }
    }

    fn update(&mut self, eager: &Times) {
        let Some((eager, read)) = fit_both(eager, &self.times) else {
            return;
        };
        let new = crossing(eager, read, self.least);
        // Of shorter lengths nothing is measured.
        let at_least = |threshold: u64| float(threshold.max(1 << CLASS_MIN));
        let ratio = at_least(new) / at_least(self.threshold());
        if self.computed.is_none() || !(1.0 / HYSTERESIS..=HYSTERESIS).contains(&ratio) {
            self.computed = Some((new, eager, read));
        }
    }

    fn why(&self, what: &str) -> String {
        let Some((_, eager, read)) = self.computed else {
            return "default, not measured yet".to_owned();
        };
        let limit = match self.threshold() {
            least if least == self.least => ", the least",
            THRESHOLD_MAX => ", the most",
            _ => "",
        };
        format!(
            "measured: {what} costs {:+.1} us, the copy of an answer {:+.3} ns a byte{limit}",
            (read.base - eager.base) / 1e3,
            eager.per_byte - read.per_byte,
        )
    }
}

/// One peer.
#[derive(Debug)]
struct Measured {
    eager: Times,
    granted: Beside,
    known: Beside,
}

impl Default for Measured {
    fn default() -> Self {
        Self { eager: Times::default(), granted: Beside::new(THRESHOLD_MIN), known: Beside::new(0) }
    }
}

impl Measured {
    fn add(&mut self, way: Way, len_bytes: u64, ns: u64) {
        match way {
            Way::Eager => self.eager.add(len_bytes, ns),
            Way::Granted => self.granted.times.add(len_bytes, ns),
            Way::Known => self.known.times.add(len_bytes, ns),
        }
        if way != Way::Known {
            self.granted.update(&self.eager);
        }
        if way != Way::Granted {
            self.known.update(&self.eager);
        }
    }
}

/// A threshold and why it is that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InWords {
    pub(super) bytes: u64,
    pub(super) why: String,
}

/// All peers.
#[derive(Debug, Default)]
pub(super) struct Paths {
    measured: BTreeMap<NodeId, Measured>,
    /// Names of peers that gave something, for receipts: all of one peer share one.
    names: BTreeMap<NodeId, Arc<str>>,
}

impl Paths {
    pub(super) fn forget_node(&mut self, node: NodeId) {
        self.measured.remove(&node);
        self.names.remove(&node);
    }
}

impl Engine {
    /// A peer's name, to be kept in many places.
    pub(super) fn shared_name_of(&mut self, node: NodeId) -> Arc<str> {
        if let Some(name) = self.paths.names.get(&node) {
            return Arc::clone(name);
        }
        let name: Arc<str> = self.name_of(node).into();
        if self.peers.contains_key(&node) {
            self.paths.names.insert(node, Arc::clone(&name));
        }
        name
    }

    /// From more than how many bytes on a known place of a peer is read, if nobody forces that.
    pub(super) fn known_from(&mut self, node: NodeId) -> u64 {
        let alone = self.fetches.len() == 1;
        let Measured { granted, known, .. } = self.paths.measured.entry(node).or_default();
        // Answers to many questions share a frame, so that a question costs less than what was measured.
        if alone { known.next() } else { known.threshold().max(granted.threshold()) }
    }

    /// The thresholds towards a peer: of answers, and of reads of known places.
    pub(super) fn thresholds_in_words(&self, node: NodeId) -> [InWords; 2] {
        if let Some(bytes) = self.config.threshold_bytes {
            let forced = InWords { bytes, why: "forced by configuration".to_owned() };
            return [forced.clone(), forced];
        }
        let default = Measured::default();
        let Measured { granted, known, .. } = self.paths.measured.get(&node).unwrap_or(&default);
        let in_words = |beside: &Beside, what| InWords { bytes: beside.threshold(), why: beside.why(what) };
        [in_words(granted, "a grant"), in_words(known, "a read of a known place")]
    }

    /// What a question names as the longest payload of its answer; begins to time it.
    pub(super) fn inline_max_for(&mut self, id: FetchId, link: LinkId, forced: Option<u64>) -> u64 {
        let node = self.links.get(&link).and_then(|link| link.node);
        let inline_max = match (forced.or(self.config.threshold_bytes), node) {
            (Some(forced), _) => forced,
            (None, Some(node)) => {
                let alone = self.fetches.len() == 1;
                let granted = &mut self.paths.measured.entry(node).or_default().granted;
                // What is not timed has nothing to explore.
                if alone { granted.next() } else { granted.threshold() }
            }
            (None, None) => THRESHOLD_DEFAULT,
        };
        self.time(id);
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.inline_max = inline_max;
        }
        inline_max
    }

    /// A get goes out. It is timed where nothing else is under way that would be timed with it.
    pub(super) fn time(&mut self, id: FetchId) {
        let timed = (self.fetches.len() == 1).then_some(Timed { asked: self.now, answered: None });
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.timed = timed;
        }
    }

    /// The answer is there, and room for it is looked for.
    pub(super) fn fetch_answered(&mut self, id: FetchId) {
        if let Some(Fetch { timed: Some(timed), .. }) = self.fetches.get_mut(id) {
            timed.answered = Some(self.now);
        }
    }

    /// There is room. Unless it was there at once, the get is not timed.
    pub(super) fn fetch_has_room(&mut self, id: FetchId) {
        let now = self.now;
        if let Some(fetch) = self.fetches.get_mut(id) {
            fetch.timed = fetch.timed.filter(|timed| timed.answered == Some(now));
        }
    }

    /// The bytes of a fetch are there.
    pub(super) fn measure(&mut self, id: FetchId, link: Option<LinkId>, way: Way, moved: Moved) {
        let timed = self.fetches.get_mut(id).and_then(|fetch| fetch.timed.take());
        let node = link.and_then(|link| self.links.get(&link)).and_then(|link| link.node);
        if let (Some(timed), Some(node)) = (timed, node) {
            let ns = self.now.0.saturating_sub(timed.asked.0);
            self.paths.measured.entry(node).or_default().add(way, moved.bytes, ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn line(base: f64, per_byte: f64) -> Line {
        Line { base, per_byte }
    }

    #[test]
    fn the_threshold_is_where_the_lines_cross_within_its_limits() {
        for (eager, read, expected) in [
            (line(20_000.0, 0.5), line(40_000.0, 0.1), 50_000),
            (line(20_000.0, 0.5), line(20_100.0, 0.1), THRESHOLD_MIN),
            (line(20_000.0, 0.5), line(19_000.0, 0.1), THRESHOLD_MIN),
            (line(20_000.0, 0.1), line(40_000.0, 0.1), THRESHOLD_MAX),
            (line(20_000.0, 0.1), line(40_000.0, 0.3), THRESHOLD_MAX),
            (line(20_000.0, 0.11), line(40_000.0, 0.1), THRESHOLD_MAX),
        ] {
            assert_eq!(crossing(eager, read, THRESHOLD_MIN), expected, "{eager:?} {read:?}");
        }
    }

    #[test]
    fn a_line_is_found_again() {
        let of = |x: f64| (1.0 / x, (x, 20_000.0 + 0.25 * x));
        let found = fit(&[of(256.0), of(4_096.0), of(65_536.0), of(1e6)]).expect("a line");
        assert!((found.base - 20_000.0).abs() < 1.0 && (found.per_byte - 0.25).abs() < 1e-6, "{found:?}");
        assert_eq!(fit(&[of(300.0)]), None);
        assert_eq!(fit(&[of(300.0), of(300.0)]), None, "one length twice");
        assert_eq!(fit(&[]), None);
    }

    #[test]
    fn a_machine_that_is_slower_for_a_while_does_not_move_the_crossing() {
        let mut measured = Measured::default();
        // Long gets are measured when everything takes three times as long as before.
        for (len, slow) in [(1_000, 1.0), (4_000, 1.0), (16_000, 1.0), (60_000, 3.0), (200_000, 3.0)] {
            for _ in 0..SAMPLES {
                sample(&mut measured, Way::Eager, len, slow * (20_000.0 + 0.2 * float(len)));
                sample(&mut measured, Way::Granted, len, slow * (40_000.0 + 0.2 * float(len)));
            }
        }
        assert_eq!(measured.granted.threshold(), THRESHOLD_MAX);
    }

    fn sample(measured: &mut Measured, way: Way, len_bytes: u64, ns: f64) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
        measured.add(way, len_bytes, ns as u64);
    }

    /// Gets of lengths around the crossing, with one in eight far too slow.
    fn run(measured: &mut Measured, eager: Line, read: Line, rounds: u64) {
        for round in 0..rounds {
            for len in [1_000, 4_000, 16_000, 60_000, 200_000] {
                let slow = if (round + len).is_multiple_of(8) { 20.0 } else { 1.0 };
                let at = |line: Line| slow * (line.base + line.per_byte * float(len));
                sample(measured, Way::Eager, len, at(eager));
                sample(measured, Way::Granted, len, at(read));
            }
        }
    }

    #[test]
    fn it_is_measured_in_spite_of_outliers_and_follows_a_change() {
        let mut measured = Measured::default();
        assert_eq!(measured.granted.threshold(), THRESHOLD_DEFAULT);
        run(&mut measured, line(20_000.0, 0.5), line(40_000.0, 0.1), 40);
        let threshold = measured.granted.threshold();
        assert!((40_000..60_000).contains(&threshold), "{threshold}");
        let why = measured.granted.why("a grant");
        assert!(why.starts_with("measured: a grant costs +") && why.contains("ns a byte"), "{why}");
        assert_eq!(measured.known.threshold(), THRESHOLD_DEFAULT, "no known place was read");
        run(&mut measured, line(20_000.0, 0.5), line(40_000.0, 0.05), 40);
        assert_eq!(measured.granted.threshold(), threshold, "44,000 is not different enough");
        run(&mut measured, line(20_000.0, 0.5), line(24_000.0, 0.1), 40);
        let threshold = measured.granted.threshold();
        // 10,000, or on the way there so near that it stayed.
        assert!((8_000..13_000).contains(&threshold), "{threshold}");
    }

    #[test]
    fn one_path_alone_decides_nothing_and_now_and_then_the_other_is_tried() {
        let mut measured = Measured::default();
        for len in [1_000, 2_000, 4_000, 8_000] {
            for _ in 0..SAMPLES {
                measured.add(Way::Eager, len, 20_000);
            }
        }
        assert_eq!((measured.granted.computed, measured.known.computed), (None, None));
        let asked: Vec<u64> = (0..EXPLORE_EVERY_AT_FIRST).map(|_| measured.granted.next()).collect();
        assert!(asked.contains(&(THRESHOLD_DEFAULT * 4)) && asked.contains(&(THRESHOLD_DEFAULT / 4)));
        run(&mut measured, line(20_000.0, 0.5), line(40_000.0, 0.1), 20);
        let threshold = measured.granted.threshold();
        let other = (0..EXPLORE_EVERY * 10).filter(|_| measured.granted.next() != threshold).count();
        assert_eq!(other, 20, "two of {EXPLORE_EVERY}");
    }

    #[test]
    fn a_known_place_has_a_threshold_of_its_own() {
        let mut measured = Measured::default();
        for len in [1_000, 4_000, 16_000, 60_000, 200_000] {
            for _ in 0..SAMPLES {
                sample(&mut measured, Way::Eager, len, 20_000.0 + 0.5 * float(len));
                sample(&mut measured, Way::Known, len, 22_000.0 + 0.4 * float(len));
            }
        }
        let threshold = measured.known.threshold();
        assert!((18_000..22_000).contains(&threshold), "{threshold}");
        assert_eq!(measured.granted.computed, None);
    }

    #[test]
    fn where_reading_is_always_faster_known_places_are_always_read_and_answers_stay_measured() {
        let mut measured = Measured::default();
        for len in [300, 1_000, 4_000, 16_000, 60_000, 200_000] {
            for _ in 0..SAMPLES {
                sample(&mut measured, Way::Eager, len, 20_000.0 + 0.5 * float(len));
                sample(&mut measured, Way::Known, len, 19_000.0 + 0.4 * float(len));
            }
        }
        assert_eq!(measured.known.threshold(), 0);
        assert!(measured.known.why("a read").ends_with(", the least"));
        let asked: Vec<u64> = (0..EXPLORE_EVERY).map(|_| measured.known.next()).collect();
        assert_eq!(asked.iter().filter(|threshold| **threshold == THRESHOLD_MIN).count(), 1);
        for len in [300, 1_000, 4_000, 16_000, 60_000, 200_000] {
            for _ in 0..SAMPLES {
                sample(&mut measured, Way::Known, len, 40_000.0 + 0.1 * float(len));
            }
        }
        assert!((40_000..60_000).contains(&measured.known.threshold()), "{}", measured.known.threshold());
    }

    #[test]
    fn lengths_far_from_any_threshold_are_not_kept() {
        let mut times = Times::default();
        for len in [0, 1, 255, 1 << 20, u64::MAX] {
            times.add(len, 1);
        }
        assert!(times.0.iter().all(VecDeque::is_empty));
        times.add(256, 0);
        times.add((1 << 20) - 1, 1);
        assert_eq!((times.0[0].len(), times.0[CLASSES - 1].len()), (1, 1));
    }
}
