//! Lists of keys, all in one arena: to put a key on a list costs no allocation once the arena has grown to what is
//! needed at the same time.
//!
//! What must hold: every link is on exactly one list or free; a list that is dropped was empty.

use super::slab::Key;

/// No link.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    key: Key,
    next: u32,
}

/// A list: names its links in a [`Links`]. In order of `push`.
#[derive(Clone, Copy)]
pub(super) struct List {
    first: u32,
    last: u32,
}

impl List {
    pub(super) const EMPTY: Self = Self { first: NONE, last: NONE };

    pub(super) fn is_empty(self) -> bool {
        self.first == NONE
    }
}

/// The links of all lists.
pub(super) struct Links {
    links: Vec<Link>,
    /// The first free one; they are linked as well.
    free: u32,
}

impl Links {
    pub(super) fn new() -> Self {
        Self { links: Vec::new(), free: NONE }
    }

    /// Puts `key` at the end of `list`.
    pub(super) fn push(&mut self, list: &mut List, key: Key) {
        let link = Link { key, next: NONE };
        let at = if self.free == NONE {
            self.links.push(link);
            (self.links.len() - 1) as u32
        } else {
            let at = self.free;
            self.free = std::mem::replace(&mut self.links[at as usize], link).next;
            at
        };
        if list.is_empty() {
            list.first = at;
        } else {
            self.links[list.last as usize].next = at;
        }
        list.last = at;
    }

    /// Takes the first key off `list`.
    pub(super) fn pop(&mut self, list: &mut List) -> Option<Key> {
        if list.is_empty() {
            return None;
        }
        let at = list.first;
        let link = self.links[at as usize];
        list.first = link.next;
        self.links[at as usize].next = std::mem::replace(&mut self.free, at);
        Some(link.key)
    }

    /// The keys on `list`.
    pub(super) fn iter(&self, list: List) -> impl Iterator<Item = Key> {
        let mut at = list.first;
        std::iter::from_fn(move || {
            let link = *self.links.get(at as usize)?;
            at = link.next;
            Some(link.key)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Three lists against plain vectors; as many links as were ever on lists at the same time.
        #[test]
        fn lists_agree_with_vectors(steps in prop::collection::vec((0usize..3, 0u8..3), 1..200)) {
            let mut links = Links::new();
            let mut lists = [List::EMPTY; 3];
            let mut model: [Vec<Key>; 3] = Default::default();
            let mut most = 0;
            for (key, (list, act)) in steps.into_iter().enumerate() {
                let plain = &mut model[list];
                match act {
                    0 => {
                        let first = if plain.is_empty() { None } else { Some(plain.remove(0)) };
                        prop_assert_eq!(links.pop(&mut lists[list]), first);
                    }
                    _ => {
                        links.push(&mut lists[list], key as Key);
                        plain.push(key as Key);
                    }
                }
                most = most.max(model.iter().map(Vec::len).sum());
                for (list, plain) in lists.iter().zip(&model) {
                    prop_assert_eq!(&links.iter(*list).collect::<Vec<_>>(), plain);
                    prop_assert_eq!(list.is_empty(), plain.is_empty());
                }
            }
            prop_assert_eq!(links.links.len(), most);
        }
    }
}
