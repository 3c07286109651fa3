//! A slab: values under small integer keys that are reused, each key carrying a generation.
//!
//! What must hold: a key names one value from `insert` to `remove`; a stale key (same place, earlier
//! generation) finds nothing. Iteration is in place order, so it is deterministic.

/// Names a value in a [`Slab`]: the place in the low 32 bits, its generation above.
pub(super) type Key = u64;

struct Place<T> {
    generation: u32,
    value: Option<T>,
}

/// Values under reusable keys.
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Puts `value` in and names it.
    pub(super) fn insert(&mut self, value: T) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, value: None });
            (self.places.len() - 1) as u32
        });
        let place = &mut self.places[index as usize];
        assert!(place.value.is_none());
        place.value = Some(value);
        u64::from(place.generation) << 32 | u64::from(index)
    }

    fn place(&self, key: Key) -> Option<&Place<T>> {
        self.places.get((key & 0xffff_ffff) as usize).filter(|place| u64::from(place.generation) == key >> 32)
    }

    /// The value under `key`, if it is still there.
    pub(super) fn get(&self, key: Key) -> Option<&T> {
        self.place(key)?.value.as_ref()
    }

    /// The value under `key`, if it is still there.
    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let place = self.places.get_mut((key & 0xffff_ffff) as usize)?;
        if u64::from(place.generation) == key >> 32 { place.value.as_mut() } else { None }
    }

    /// Takes the value under `key` out.
    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let index = key & 0xffff_ffff;
        let place = self.places.get_mut(index as usize)?;
        if u64::from(place.generation) != key >> 32 {
            return None;
        }
        let value = place.value.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(index as u32);
        Some(value)
    }

    /// All values with their keys, in place order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.places.iter().enumerate().filter_map(|(index, place)| {
            let key = u64::from(place.generation) << 32 | index as u64;
            place.value.as_ref().map(|value| (key, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_keys_find_nothing() {
        let mut slab = Slab::new();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_eq!((slab.get(a), slab.get(b)), (None, Some(&'b')));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.len(), 1);
        assert_eq!(slab.iter().collect::<Vec<_>>(), vec![(b, &'b')]);
    }
}
