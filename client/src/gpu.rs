//! Objects in GPU memory: found, held and written where they are. Not copies to a tensor of the caller's, which
//! `hetmem_gpu_mem::Stream` makes. Invariant: while a [`GpuObject`] lives its pin holds its extent, and its segment is
//! mapped here; no CUDA context is created before the first of them, and then only on its device.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use hetmem_core::receipt::{Path, Receipt};
use hetmem_core::wire::{ClientMessage, ClientReply, GpuTier};
use hetmem_core::{
    Checksum, ErrorKind, Extent, Generation, Key, ObjectId, ObjectMeta, SegmentId, StoreError, Tier, TierHint,
};
use hetmem_gpu_mem::{AccessRights, Device, Gpus, Imported, Memory, Span, Unavailable};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::checked::Streams;
use crate::object::Object;
use crate::options::{GetOptions, PutOptions, PutOutcome};
use crate::reservation::{Reservation, Written};
use crate::shared::{Shared, unexpected};
use crate::store::{ANSWER_GRACE, Store, get_message, refuse_staged, verified, wrong_length};

/// An object where it was found.
#[derive(Debug)]
pub enum Placed {
    /// In host memory.
    Host(Object),
    /// In GPU memory.
    Gpu(GpuObject),
}

/// The bytes of an object, or of a part of it, in GPU memory. Dropping it lets go of them.
///
/// Where the driver has no read-only mappings ([`GpuObject::rights`]), nothing but good manners keeps this process
/// from writing to them: an object is immutable, and others read it.
#[must_use = "an object holds its memory until it is dropped"]
pub struct GpuObject {
    object: Object,
    memory: Arc<Imported>,
}

impl GpuObject {
    /// The address of the first byte on the device, in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.memory.address().wrapping_add(self.object.extent().offset)
    }

    /// How many bytes there are: those of the object, or of the part that was asked for.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.object.extent().len_bytes
    }

    /// The device as this process sees it, which may number devices in another way than the node.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// The tier, as the node numbers it.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.object.tier()
    }

    /// What the driver lets this process do with the memory.
    #[must_use]
    pub fn rights(&self) -> AccessRights {
        self.memory.rights()
    }

    /// The bytes, to copy from. The span holds the mapping, not the pin: keep the object until the copy has ended.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if they are not inside the segment that the node has described.
    pub fn span(&self) -> Result<Span, StoreError> {
        let Extent { offset, len_bytes, .. } = *self.object.extent();
        Span::new(Memory::Imported(Arc::clone(&self.memory)), offset, len_bytes)
    }

    pub(crate) fn shared(&self) -> &Shared {
        self.object.shared()
    }

    /// What the bytes of the whole object mean.
    #[must_use]
    pub fn meta(&self) -> &ObjectMeta {
        self.object.meta()
    }

    /// Which object of the key it is.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.object.id()
    }

    /// How the bytes came here for this get.
    #[must_use]
    pub fn path(&self) -> Path {
        self.object.path()
    }

    /// How this get really moved the bytes.
    #[must_use]
    pub fn receipt(&self) -> Receipt {
        self.object.receipt()
    }
}

impl fmt::Debug for GpuObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuObject")
            .field("object", &self.object)
            .field("address", &format_args!("{:#x}", self.address()))
            .finish_non_exhaustive()
    }
}

/// What a request for GPU memory has led to.
#[derive(Debug)]
pub enum GpuReserved {
    /// GPU memory to write into.
    Open(GpuReservation),
    /// Host memory: there was no room on the GPU, and that was allowed.
    Host(Reservation),
    /// An object of this key is there and is kept.
    Kept(PutOutcome),
}

/// GPU memory for one object: copy into [`GpuReservation::span`], or write at its address, then seal. Dropped
/// unsealed, the memory goes back.
#[derive(Debug)]
#[must_use = "a reservation that is dropped is given up"]
pub struct GpuReservation {
    /// Keeps number and options, and gives the memory back; writes nothing itself.
    reservation: Reservation,
    memory: Arc<Imported>,
    extent: Extent,
}

impl GpuReservation {
    /// The address of the first byte on the device, in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.memory.address().wrapping_add(self.extent.offset)
    }

    /// The device as this process sees it.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// The object's bytes, to copy to.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Invalid`] if they are not inside the segment that the node has described.
    pub fn span(&self) -> Result<Span, StoreError> {
        let Extent { offset, len_bytes, .. } = self.extent;
        Span::new(Memory::Imported(Arc::clone(&self.memory)), offset, len_bytes)
    }

    pub(crate) fn options(&self) -> &PutOptions {
        self.reservation.options()
    }

    pub(crate) fn shared(&self) -> &Shared {
        self.reservation.shared()
    }

    /// Makes the object readable: its bytes are there.
    pub(crate) fn seal_with(self, checksum: Checksum) -> Result<PutOutcome, StoreError> {
        self.reservation.seal_written(checksum)
    }
}

/// A granted segment, and whether the node knows that it is mapped.
type Granted = Result<(Arc<Imported>, bool), StoreError>;

/// The GPU segments that this process maps.
#[derive(Debug, Default)]
pub(crate) struct GpuSegments {
    /// The GPU tiers of the node.
    tiers: Vec<GpuTier>,
    gpus: Mutex<Option<Result<Gpus, Unavailable>>>,
    /// Kept once used: a context takes long to make.
    devices: Mutex<BTreeMap<u16, Device>>,
    pub(crate) streams: Streams,
    read: RwLock<HashMap<SegmentId, Arc<Imported>>>,
    granted: Mutex<HashMap<SegmentId, Granted>>,
    /// A granted segment was added.
    added: Condvar,
}

impl GpuSegments {
    pub(crate) fn of(tiers: Vec<GpuTier>) -> Self {
        Self { tiers, ..Self::default() }
    }

    /// The device that a tier of the node is on, as this process sees it.
    fn device(&self, tier: Tier) -> Result<Device, StoreError> {
        let Tier::Gpu(ordinal) = tier else {
            return Err(StoreError::protocol("host memory is on no GPU"));
        };
        let mut devices = self.devices.lock();
        if let Some(device) = devices.get(&ordinal) {
            return Ok(device.clone());
        }
        let gpus = self.gpus.lock().get_or_insert_with(Gpus::open).clone()?;
        let known = self.tiers.iter().find(|known| known.ordinal == ordinal);
        let uuid = known.map(|known| known.uuid.as_str()).ok_or_else(|| {
            StoreError::protocol(format!("the node has not said which GPU its tier {tier} is on"))
        })?;
        let here = gpus.probe().devices.iter().find(|device| device.uuid == uuid).ok_or_else(|| {
            let why = format!("this process does not see the GPU {uuid}: see CUDA_VISIBLE_DEVICES");
            StoreError::unavailable(tier.to_string(), why)
        })?;
        let device = gpus.device(here.ordinal)?;
        devices.insert(ordinal, device.clone());
        Ok(device)
    }

    /// The tier that is on a device of this process.
    fn tier_of(&self, ordinal: u16) -> Result<Tier, StoreError> {
        let gpus = self.gpus.lock().get_or_insert_with(Gpus::open).clone()?;
        let what = || format!("device {ordinal} of this process");
        let device = gpus.probe().devices.iter().find(|device| device.ordinal == ordinal);
        let uuid = device.map(|device| &device.uuid).ok_or_else(|| {
            StoreError::unavailable(what(), "there is no such device: see CUDA_VISIBLE_DEVICES")
        })?;
        let tier = self.tiers.iter().find(|tier| tier.uuid == *uuid);
        tier.map(|tier| Tier::Gpu(tier.ordinal)).ok_or_else(|| {
            let why = format!("the node has no tier on {uuid}: see the key gpu, and hetmem doctor");
            StoreError::unavailable(what(), why)
        })
    }

    /// Lets go of segments that the node has retired, as soon as nobody uses them.
    pub(crate) fn release(&self, segment: SegmentId) {
        self.read.write().remove(&segment);
        self.granted.lock().remove(&segment);
    }

    fn import(
        &self,
        tier: Tier,
        fd: &OwnedFd,
        len_bytes: u64,
        rights: AccessRights,
    ) -> Result<Arc<Imported>, StoreError> {
        self.device(tier)?.import_segment(fd, len_bytes, rights).map(Arc::new)
    }

    /// Imports a granted segment whose descriptor has come: it comes until the node has been told that it is mapped.
    pub(crate) fn add(&self, segment: SegmentId, tier: Tier, fd: &OwnedFd, len_bytes: u64) {
        let mut granted = self.granted.lock();
        if !matches!(granted.get(&segment), Some(Ok(_))) {
            let imported = self.import(tier, fd, len_bytes, AccessRights::ReadWrite);
            granted.insert(segment, imported.map(|imported| (imported, false)));
        }
        drop(granted);
        self.added.notify_all();
    }
}

impl Shared {
    /// The mapping of a segment that this client may read.
    fn gpu_segment(&self, segment: SegmentId, tier: Tier) -> Result<Arc<Imported>, StoreError> {
        if let Some(imported) = self.gpu.read.read().get(&segment) {
            return Ok(Arc::clone(imported));
        }
        let (fd, len_bytes) = self.ask_for_segment(segment)?;
        let imported = self.gpu.import(tier, &fd, len_bytes, AccessRights::ReadOnly)?;
        // Where two threads did, one mapping stays.
        Ok(Arc::clone(self.gpu.read.write().entry(segment).or_insert(imported)))
    }

    /// A granted segment, which the node knows to be mapped. Its descriptor may have come with another thread's answer,
    /// which is then about to bring it: waits until `deadline`.
    fn granted_gpu_segment(
        &self,
        segment: SegmentId,
        deadline: Instant,
    ) -> Result<Arc<Imported>, StoreError> {
        let mut granted = self.gpu.granted.lock();
        let (imported, told) = loop {
            if let Some(found) = granted.get(&segment) {
                break found.clone()?;
            }
            if self.gpu.added.wait_until(&mut granted, deadline).timed_out() {
                let why = format!("segment {segment} was granted without a descriptor");
                return Err(StoreError::protocol(why));
            }
        };
        drop(granted);
        if !told {
            self.ask_done(&ClientMessage::Mapped { segment })?;
            if let Some(Ok((_, told))) = self.gpu.granted.lock().get_mut(&segment) {
                *told = true;
            }
        }
        Ok(imported)
    }
}

impl Store {
    /// An object in a tier: in place if it is there, else copied there by the node, which fetches it from another one if
    /// need be. With `hint.or_host` it may be in host memory instead, where there is no room on the GPU, no such GPU, or
    /// this process does not see it. An object without bytes may be anywhere.
    ///
    /// # Errors
    /// As [`Store::get_with`]; [`hetmem_core::ErrorKind::NoSpace`] naming the tier;
    /// [`hetmem_core::ErrorKind::Unavailable`] if the node has no such tier or if this process does not see its device.
    pub fn get_in(
        &self,
        key: &Key,
        hint: impl Into<TierHint>,
        options: &GetOptions,
    ) -> Result<Placed, StoreError> {
        let hint = hint.into();
        match self.in_tier(key, hint, options) {
            Err(error) if hint.or_host && error.kind() == ErrorKind::Unavailable => {
                self.get_with(key, options).map(Placed::Host)
            }
            placed => placed,
        }
    }

    /// The node's tier on a device that this process numbers `ordinal`.
    ///
    /// # Errors
    /// [`hetmem_core::ErrorKind::Unavailable`] if there is no such device, or no tier on it.
    pub fn tier_of_device(&self, ordinal: u16) -> Result<Tier, StoreError> {
        self.shared.gpu.tier_of(ordinal)
    }

    fn in_tier(&self, key: &Key, hint: TierHint, options: &GetOptions) -> Result<Placed, StoreError> {
        if let Some(found) = self.local_in(key, hint.tier, options) {
            return found;
        }
        let started = Instant::now();
        let message = get_message(key, options, Some(hint));
        let answer = self.shared.call(&message, &[], options.timeout + ANSWER_GRACE)?;
        let ClientReply::Located(located) = answer.reply else {
            return Err(unexpected(&message, &answer.reply));
        };
        if located.tier == Tier::Host {
            return self.remote(key, located, options, started.elapsed()).map(Placed::Host);
        }
        let wanted = options.range.map_or(located.meta.len_bytes, |range| range.len_bytes);
        // Made first, so that every error from here on gives the pin back.
        let object = Object::located(&self.shared, located, started.elapsed());
        if object.extent().len_bytes != wanted {
            return Err(wrong_length(key, object.extent(), wanted));
        }
        refuse_staged(key, &object, options)?;
        self.on_gpu(key, object, options).map(Placed::Gpu)
    }

    fn on_gpu(&self, key: &Key, object: Object, options: &GetOptions) -> Result<GpuObject, StoreError> {
        let memory = self.shared.gpu_segment(object.extent().segment, object.tier())?;
        let Extent { segment, offset, len_bytes } = *object.extent();
        if offset.checked_add(len_bytes).is_none_or(|end| end > memory.len_bytes()) {
            let why = format!("{len_bytes} bytes at {offset} are not inside segment {segment}");
            return Err(StoreError::protocol(why));
        }
        let object = GpuObject { object, memory };
        if options.verify {
            object.verify_as(key)?;
        }
        Ok(object)
    }

    /// The object, if it is in this tier of this node. Asks nobody once its segment is mapped.
    fn local_in(&self, key: &Key, tier: Tier, options: &GetOptions) -> Option<Result<Placed, StoreError>> {
        let shared = &self.shared;
        let pinned = match shared.index.get(key, key.fingerprint(), &shared.page) {
            Ok(pinned) => pinned?,
            Err(error) => return Some(Err(error)),
        };
        let mut object = Object::local(shared, &pinned);
        if object.tier() != tier {
            return None;
        }
        let placed = object.narrow(key, options.range).and_then(|()| match tier {
            Tier::Host => {
                self.map(object).and_then(|object| verified(key, object, options)).map(Placed::Host)
            }
            Tier::Gpu(_) => self.on_gpu(key, object, options).map(Placed::Gpu),
        });
        Some(placed)
    }

    /// Asks for GPU memory to write an object into, on the node's `gpu:ordinal`. The object stays there, unless
    /// `options.tier` names another tier, to which it is moved at seal.
    ///
    /// # Errors
    /// As [`Store::get_in`] and [`Store::put_with`]; where `options.tier` allows host memory, lack of room is none.
    pub fn reserve_gpu(
        &self,
        key: &Key,
        meta: ObjectMeta,
        ordinal: u16,
        options: &PutOptions,
    ) -> Result<GpuReserved, StoreError> {
        let started = Instant::now();
        let meta = meta.with_checksum(Checksum::None);
        meta.check()?;
        let (writes, hints, if_exists) = (Tier::Gpu(ordinal), options.hints(), options.if_exists);
        let message = ClientMessage::Reserve { key: key.clone(), meta, hints, if_exists, writes };
        let mut answer = self.shared.call(&message, &[], options.timeout)?;
        let (number, extent, tier, map) = match answer.reply {
            ClientReply::Reserved { reservation, extent, tier, map } => (reservation, extent, tier, map),
            reply => {
                let kept = self.shared.outcome(&reply, meta.len_bytes, started);
                return kept.map(GpuReserved::Kept).ok_or_else(|| unexpected(&message, &reply));
            }
        };
        // Made first, so that every error from here on gives the memory back.
        let reservation = self.open_reservation(key, meta, options, number);
        if extent.len_bytes != meta.len_bytes {
            return Err(wrong_length(key, &extent, meta.len_bytes));
        }
        let fd = answer.descriptors.pop();
        match (tier, map) {
            (Tier::Host, map) => {
                self.place_in_host(reservation, key, &extent, (map, fd), options).map(GpuReserved::Host)
            }
            (Tier::Gpu(_), Some(segment_len)) => {
                if let Some(fd) = fd {
                    self.shared.gpu.add(extent.segment, tier, &fd, segment_len);
                }
                let memory =
                    self.shared.granted_gpu_segment(extent.segment, Instant::now() + options.timeout)?;
                Ok(GpuReserved::Open(GpuReservation { reservation, memory, extent }))
            }
            (Tier::Gpu(_), None) => {
                Err(StoreError::protocol("GPU memory was reserved that nobody can write"))
            }
        }
    }

    fn open_reservation(
        &self,
        key: &Key,
        meta: ObjectMeta,
        options: &PutOptions,
        number: Generation,
    ) -> Reservation {
        let place = Written::Sent(Vec::new());
        Reservation::new(Arc::clone(&self.shared), key.clone(), meta, *options, number, place)
    }
}
