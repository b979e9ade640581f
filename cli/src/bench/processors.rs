//! Two halves of the processors, one for each of two nodes, as if each had a machine of its own: where the scheduler puts
//! their threads, together or apart, changes what a small get takes by a factor of two from one second to the next. Not
//! a setting of the store. Invariant: the halves share no processor.

use hetmem_client::StoreError;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The processors that this thread may use, in two halves.
pub(super) struct Halves([Vec<usize>; 2]);

impl Halves {
    /// Of the processors that this thread may use now; none if there is only one.
    ///
    /// # Errors
    /// `Os` if the system does not tell them.
    pub(super) fn of_all() -> Result<Option<Self>, StoreError> {
        let all = sched_getaffinity(None).map_err(|error| StoreError::os("sched_getaffinity", error))?;
        let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&at| all.is_set(at)).collect();
        let (first, second) = all.split_at(all.len() / 2);
        Ok((!first.is_empty()).then(|| Self([first.to_vec(), second.to_vec()])))
    }

    /// Keeps this thread, and whatever it starts from now on, to one half.
    ///
    /// # Errors
    /// `Os` if the system refuses.
    pub(super) fn keep_to(&self, half: usize) -> Result<(), StoreError> {
        let mut set = CpuSet::new();
        for &at in &self.0[half] {
            set.set(at);
        }
        sched_setaffinity(None, &set).map_err(|error| StoreError::os("sched_setaffinity", error))
    }

    /// The numbers of a half's processors, for people.
    pub(super) fn name(&self, half: usize) -> String {
        self.0[half].iter().map(usize::to_string).collect::<Vec<_>>().join(",")
    }
}
