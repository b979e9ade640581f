//! Adapters and what is registered with them, as they come and go. Not connections. Invariant: every segment is registered
//! with all adapters, and nothing of an adapter outlives it here.

use std::sync::Arc;

use hetmem_core::{LinkId, SegmentId, StoreError, TransferId};

use super::super::abi;
use super::super::adapters::{Adapter, Segment};
use super::super::links::Stage;
use super::super::plugin::{Connection, Context, Device, device_name};
use super::super::proof::{Proof, Scratch, prove};
use super::super::wire::{Described, describe};
use super::State;
use crate::fabric::SendToken;

/// Tries what a device can do with each kind of memory, and says what was found.
pub(in crate::verbs) fn prove_all(
    context: &Context,
    device: &Device,
    name: &str,
    scratches: &[Arc<dyn Scratch>],
) -> Vec<Proof> {
    let proofs: Vec<Proof> =
        scratches.iter().map(|scratch| prove(context, device.address(), &**scratch)).collect();
    for proof in &proofs {
        if proof.is_whole() {
            tracing::info!(device = name, %proof, "an RDMA device was tried");
        } else {
            tracing::warn!(device = name, %proof, "an RDMA device was tried, and not everything works");
        }
    }
    proofs
}

impl State {
    /// The adapter that a connection goes through, opened if it is the first.
    pub(in crate::verbs) fn adapter_of(&mut self, connection: &Connection) -> Result<usize, StoreError> {
        self.adapter(Device::raw_of(connection)?)
    }

    pub(super) fn adapter(&mut self, raw: *mut abi::Device) -> Result<usize, StoreError> {
        if let Some((&number, _)) = self.adapters.iter().find(|(_, adapter)| adapter.device.is(raw)) {
            return Ok(number);
        }
        let device = Device::own(&self.context, raw);
        let proofs = self.proofs_of(&device)?;
        let adapter = Adapter::open(device, &self.segments, self.effects.len(), (self.push, proofs))?;
        tracing::info!(device = adapter.name(), "an RDMA device is used");
        let number = usize::try_from(self.number()).unwrap_or(0);
        self.adapters.insert(number, adapter);
        self.unwatched.push(number);
        Ok(number)
    }

    /// What a device can do, as tried now or before.
    fn proofs_of(&mut self, device: &Arc<Device>) -> Result<Vec<Proof>, StoreError> {
        let name = device_name(&device.limits()?);
        if !self.proofs.contains_key(&name) && !self.scratches.is_empty() {
            let proofs = prove_all(&self.context, device, &name, &self.scratches);
            self.proofs.insert(name.clone(), proofs);
        }
        Ok(self.proofs.get(&name).cloned().unwrap_or_default())
    }

    /// Opens the adapters that peers may come through, the one that the listener is bound to or all that there are: so that
    /// segments are registered before anybody asks for them.
    ///
    /// # Errors
    /// Why none of them can be used.
    pub(in crate::verbs) fn open_adapters(&mut self) -> Result<(), StoreError> {
        let bound = self.listener.as_ref().filter(|_| !self.at.ip().is_unspecified());
        if let Some(listener) = bound {
            let device = Device::raw_of(listener)?;
            return self.adapter(device).map(drop);
        }
        // One that cannot be used does not keep the others from being used.
        let mut failed = None;
        for device in self.context.devices() {
            if let Err(why) = self.adapter(device) {
                tracing::warn!(%why, "an RDMA device cannot be used");
                failed = Some(why);
            }
        }
        failed.filter(|_| self.adapters.is_empty()).map_or(Ok(()), Err)
    }

    pub(in crate::verbs) fn connections_by_device(&self) -> Vec<(String, usize)> {
        let count = |number| self.ends.values().filter(|end| end.adapter == Some(number)).count();
        self.adapters.iter().map(|(&number, adapter)| (adapter.name(), count(number))).collect()
    }

    /// An adapter's device goes away, or is broken: so does everything that goes through it.
    pub(in crate::verbs) fn lose_adapter(&mut self, number: usize, why: &StoreError) {
        let of_it = self.ends.iter().filter(|(_, end)| end.adapter == Some(number));
        let tokens: Vec<u64> = of_it.map(|(token, _)| *token).collect();
        for token in tokens {
            self.end_over(token, None, why);
        }
        if let Some(adapter) = self.adapters.remove(&number) {
            tracing::warn!(device = adapter.name(), %why, "an RDMA device is not used any more");
        }
    }

    /// A device is waiting to be closed so that it can go.
    pub(in crate::verbs) fn device_removed(&mut self, raw: *mut abi::Device) {
        let why = StoreError::unavailable("its connection", "the RDMA device was removed");
        // Before the adapter: its device is named by what is known of it.
        if self.listener.as_ref().is_some_and(|it| Device::raw_of(it).is_ok_and(|of| of == raw)) {
            self.listener = None;
        }
        let number =
            self.adapters.iter().find(|(_, adapter)| adapter.device.is(raw)).map(|(number, _)| *number);
        match number {
            Some(number) => self.lose_adapter(number, &why),
            // It was opened, and not used yet.
            None => drop(Device::own(&self.context, raw)),
        }
    }

    /// Listens again if the device that it listened on was removed, and is back.
    pub(in crate::verbs) fn listen_again(&mut self) {
        if self.listener.is_some() {
            return;
        }
        if let Ok((listener, _)) = self.context.listen(self.at, 0) {
            self.listener = Some(listener);
            match self.open_adapters() {
                Ok(()) => tracing::info!(address = %self.at, "RDMA is listened for again"),
                Err(why) => {
                    tracing::warn!(%why, "the RDMA device that is back cannot be used");
                    self.listener = None;
                }
            }
        }
    }

    /// Registers a segment with all adapters, or with none.
    pub(in crate::verbs) fn register(
        &mut self,
        number: SegmentId,
        segment: Segment,
    ) -> Result<(), StoreError> {
        let mut failed = None;
        for adapter in self.adapters.values_mut() {
            if let Err(why) = adapter.register(number, &segment) {
                failed = Some(why);
                break;
            }
        }
        if let Some(why) = failed {
            self.adapters.values_mut().for_each(|adapter| adapter.deregister(number));
            return Err(why);
        }
        self.segments.insert(number, segment);
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.tell_of(link, number);
        }
        Ok(())
    }

    pub(in crate::verbs) fn deregister(&mut self, number: SegmentId) {
        let Some(segment) = self.segments.remove(&number) else { return };
        let why = |transfer: TransferId| {
            let subject = format!("transfer {transfer}");
            StoreError::stale("read", subject, format!("local segment {number} was deregistered"))
        };
        let mut of_it = Vec::new();
        for link in self.links.values() {
            let all = link.waiting.iter().chain(link.under_way.values());
            of_it.extend(all.filter(|read| read.segment == Some(number)).map(|read| read.transfer));
        }
        for transfer in of_it {
            self.give_up(transfer, &why(transfer));
        }
        self.adapters.values_mut().for_each(|adapter| adapter.deregister(number));
        let gone = describe(segment.key, &Described::Gone);
        for link in self.links.values_mut().filter(|link| link.stage != Stage::Dialing) {
            link.queue_always(gone.clone(), None, SendToken(0));
        }
        self.post_all();
    }

    /// Tells the peer of a link of a segment.
    pub(in crate::verbs) fn tell_of(&mut self, link: LinkId, number: SegmentId) {
        let Some(link) = self.links.get_mut(&link).filter(|link| link.stage != Stage::Dialing) else {
            return;
        };
        let adapter = self.ends.get(&link.control).and_then(|end| end.adapter);
        let adapter = adapter.and_then(|adapter| self.adapters.get(&adapter));
        if let (Some(adapter), Some(segment)) = (adapter, self.segments.get(&number)) {
            let described = adapter.describe(number, segment);
            link.queue_always(describe(segment.key, &described), None, SendToken(0));
        }
    }
}
