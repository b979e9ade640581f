//! A state dict with GPT-2's real tensor names, shapes and types, and made-up values. Not a model: nobody should
//! run it. Invariant: a tensor's values follow from its name alone, so they need not be kept to be compared.

use hetmem_client::{DType, ObjectMeta, StoreError};

const LAYERS: u64 = 12;
const VOCABULARY: u64 = 50_257;
const POSITIONS: u64 = 1024;
const WIDTH: u64 = 768;

/// A tensor that can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Generated {
    pub(crate) name: String,
    pub(crate) meta: ObjectMeta,
}

/// GPT-2 small: 148 tensors, 497,759,232 bytes of fp32 with 12 layers.
///
/// With `size_bytes` the vocabulary shrinks in proportion and as many layers are made as come nearest to it, at
/// least one, so that nothing is smaller than about 31 MB.
pub(crate) fn gpt2(size_bytes: Option<u64>) -> Result<Vec<Generated>, StoreError> {
    let (layers, vocabulary) = match size_bytes {
        None => (LAYERS, VOCABULARY),
        Some(size) => scaled(size)?,
    };
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[u64]| -> Result<(), StoreError> {
        let meta = ObjectMeta::tensor(DType::F32, shape)?;
        tensors.push(Generated { name, meta });
        Ok(())
    };
    add("wte.weight".to_owned(), &[vocabulary, WIDTH])?;
    add("wpe.weight".to_owned(), &[POSITIONS, WIDTH])?;
    for layer in 0..layers {
        for (part, shape) in layer_parts() {
            add(format!("h.{layer}.{part}.weight"), &shape)?;
            // A Conv1D or LayerNorm has one bias for each of its outputs.
            add(format!("h.{layer}.{part}.bias"), &shape[shape.len() - 1..])?;
        }
    }
    add("ln_f.weight".to_owned(), &[WIDTH])?;
    add("ln_f.bias".to_owned(), &[WIDTH])?;
    Ok(tensors)
}

/// The parts of a layer, with the shapes of their weights. The Conv1D of GPT-2 keeps inputs first.
fn layer_parts() -> [(&'static str, Vec<u64>); 6] {
    [
        ("ln_1", vec![WIDTH]),
        ("attn.c_attn", vec![WIDTH, 3 * WIDTH]),
        ("attn.c_proj", vec![WIDTH, WIDTH]),
        ("ln_2", vec![WIDTH]),
        ("mlp.c_fc", vec![WIDTH, 4 * WIDTH]),
        ("mlp.c_proj", vec![4 * WIDTH, WIDTH]),
    ]
}

/// Layers and vocabulary for about this many bytes.
fn scaled(size_bytes: u64) -> Result<(u64, u64), StoreError> {
    let element = 4;
    let weights = |shape: &[u64]| shape.iter().product::<u64>() + shape.last().copied().unwrap_or_default();
    let layer: u64 = layer_parts().iter().map(|(_, shape)| weights(shape) * element).sum();
    let fixed = (POSITIONS + 2) * WIDTH * element;
    let full = fixed + LAYERS * layer + VOCABULARY * WIDTH * element;
    let most = full * 64;
    if size_bytes > most {
        return Err(StoreError::too_large("demo", "size in bytes", size_bytes, most));
    }
    let vocabulary = (VOCABULARY * size_bytes / full).clamp(1, VOCABULARY);
    let left = size_bytes.saturating_sub(fixed + vocabulary * WIDTH * element);
    let layers = ((left + layer / 2) / layer).max(1);
    Ok((layers, vocabulary))
}

/// Bytes of pseudo-random fp32 values between -0.05 and 0.05, the same for the same seed, from any place on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Values {
    seed: u64,
}

impl Values {
    /// The values of the tensor of this name.
    pub(crate) fn of(name: &str) -> Self {
        Self { seed: hetmem_core::fingerprint(name.as_bytes()) }
    }

    /// Writes the bytes from `start`, a multiple of 8, on.
    pub(crate) fn fill(self, start: u64, bytes: &mut [u8]) {
        debug_assert!(start.is_multiple_of(8));
        let mut at = self.seed.wrapping_add(start / 8);
        for two in bytes.chunks_mut(8) {
            let word = mix(at);
            at = at.wrapping_add(1);
            let pair = [value(word), value(word >> 32)];
            let pair = [pair[0].to_le_bytes(), pair[1].to_le_bytes()];
            two.copy_from_slice(&pair.as_flattened()[..two.len()]);
        }
    }

    /// The first byte at which `bytes`, which start at `start`, are not these values.
    pub(crate) fn first_difference(self, start: u64, bytes: &[u8]) -> Option<u64> {
        let mut expected = vec![0; CHUNK.min(bytes.len())];
        for (number, part) in bytes.chunks(CHUNK).enumerate() {
            let from = start + (number * CHUNK) as u64;
            let expected = &mut expected[..part.len()];
            self.fill(from, expected);
            if part != expected {
                let at = part.iter().zip(&*expected).position(|(left, right)| left != right);
                return Some(from + at.unwrap_or_default() as u64);
            }
        }
        None
    }
}

/// Compared at a time: stays in the cache.
const CHUNK: usize = 64 * 1024;

/// SplitMix64: each number gives an unrelated one.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 24 bits as a number between -0.05 and 0.05.
fn value(bits: u64) -> f32 {
    let bits = (bits & 0xff_ffff) as f32;
    (bits / 8_388_608.0 - 1.0) * 0.05
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2_small_is_what_it_is_elsewhere() {
        let tensors = gpt2(None).expect("GPT-2");
        assert_eq!(tensors.len(), 148);
        assert_eq!(tensors.iter().map(|tensor| tensor.meta.len_bytes).sum::<u64>(), 497_759_232);
        let shape = |name: &str| {
            let tensor = tensors.iter().find(|tensor| tensor.name == name).expect(name);
            tensor.meta.shape.dims().to_vec()
        };
        assert_eq!(shape("wte.weight"), [50_257, 768]);
        assert_eq!(shape("h.11.attn.c_attn.weight"), [768, 2304]);
        assert_eq!(shape("h.0.attn.c_attn.bias"), [2304]);
        assert_eq!(shape("h.3.mlp.c_proj.weight"), [3072, 768]);
        assert_eq!(shape("h.3.mlp.c_fc.bias"), [3072]);
        assert_eq!(shape("ln_f.bias"), [768]);
    }

    #[test]
    fn sizes_come_near_what_was_asked() {
        for size in [64_u64 << 20, 200 << 20, 497_759_232, 1 << 30] {
            let made: u64 =
                gpt2(Some(size)).expect("scaled").iter().map(|tensor| tensor.meta.len_bytes).sum();
            assert!(made.abs_diff(size) < 16 << 20, "{size} asked, {made} made");
        }
        assert!(gpt2(Some(0)).expect("the smallest").len() >= 16);
        assert!(gpt2(Some(u64::MAX)).is_err());
    }

    #[test]
    fn values_return_from_any_place_and_differences_are_found() {
        let values = Values::of("wte.weight");
        let mut whole = vec![0; 3 * CHUNK + 4];
        values.fill(0, &mut whole);
        let mut part = vec![0; 100];
        values.fill(CHUNK as u64 + 8, &mut part);
        assert_eq!(part, whole[CHUNK + 8..CHUNK + 108]);
        assert_eq!(values.first_difference(0, &whole), None);
        for at in [0, CHUNK, 3 * CHUNK + 3] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert_eq!(values.first_difference(0, &changed), Some(at as u64));
        }
        assert_ne!(Values::of("wpe.weight").first_difference(0, &whole), None);
        for four in whole.chunks(4) {
            let value = f32::from_le_bytes(four.try_into().expect("four bytes"));
            assert!((-0.05..=0.05).contains(&value), "{value}");
        }
    }
}
