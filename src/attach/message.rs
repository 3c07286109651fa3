//! Generic netlink messages as bytes: just what the kernel's `nbd` and `nlctrl` families need. Pure.
//!
//! ```text
//!   datagram = message…      message = length u32 · kind u16 · flags u16 · sequence u32 · port u32 · payload, padded to 4
//!   payload of a family's message = command u8 · version u8 · 0 u16 · attribute…
//!   attribute = length u16 · id u16 · value, padded to 4      (a nested attribute's value is attributes again)
//! ```
//!
//! What must hold: integers are the machine's own endianness; whatever bytes come in, nothing panics and nothing is
//! read past its end; a message or an attribute that is cut short ends the reading with [`Malformed`].

/// Kind of a message that carries an error's number, or 0 for "done".
pub const KIND_ERROR: u16 = 2;
/// Kind of the messages to and from the family that knows the families.
pub const KIND_CONTROL: u16 = 0x10;
/// The first kind that belongs to a family; below are netlink's own.
const KIND_FAMILY_MIN: u16 = KIND_CONTROL;

const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;
const HEADER_BYTES: usize = 16;
const FAMILY_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The two upper bits of an attribute's id are flags: its value is nested; it is big-endian.
const ATTRIBUTE_NESTED: u16 = 1 << 15;
const ATTRIBUTE_ID_MASK: u16 = !(3 << 14);

const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(4)
}

/// What came is no netlink message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's netlink message is cut short")]
pub struct Malformed;

/// Attributes to be sent, encoded as they are added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds a value.
    ///
    /// # Panics
    /// Where it is longer than an attribute can be (64 KiB).
    fn add(mut self, id: u16, value: &[u8]) -> Self {
        let Ok(length) = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()) else {
            panic!("an attribute of {} bytes", value.len())
        };
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&id.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(padded(self.0.len()), 0);
        self
    }

    /// Adds a 32-bit number.
    #[must_use]
    pub fn u32(self, id: u16, value: u32) -> Self {
        self.add(id, &value.to_ne_bytes())
    }

    /// Adds a 64-bit number.
    #[must_use]
    pub fn u64(self, id: u16, value: u64) -> Self {
        self.add(id, &value.to_ne_bytes())
    }

    /// Adds a text, with the NUL at its end that the kernel wants.
    ///
    /// # Panics
    /// Where it is longer than 64 KiB.
    #[must_use]
    pub fn text(self, id: u16, value: &str) -> Self {
        self.add(id, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds attributes in an attribute.
    ///
    /// # Panics
    /// Where they are longer than 64 KiB.
    #[must_use]
    pub fn nested(self, id: u16, inner: &Attributes) -> Self {
        self.add(id | ATTRIBUTE_NESTED, &inner.0)
    }
}

/// A request to a family, which is to be answered with an error's number or "done".
#[must_use]
pub fn encode(family: u16, command: u8, version: u8, sequence: u32, attributes: &Attributes) -> Vec<u8> {
    let length = HEADER_BYTES + FAMILY_HEADER_BYTES + attributes.0.len();
    let mut bytes = Vec::with_capacity(length);
    // Attributes are bounded by 64 KiB each, and there are a handful.
    bytes.extend_from_slice(&(length as u32).to_ne_bytes());
    bytes.extend_from_slice(&family.to_ne_bytes());
    bytes.extend_from_slice(&(FLAG_REQUEST | FLAG_ACK).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes()); // the kernel fills in our port
    bytes.extend_from_slice(&[command, version, 0, 0]);
    bytes.extend_from_slice(&attributes.0);
    bytes
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// The request of this sequence number failed with this `errno`, or is done (0).
    Result(i32),
    /// A family's message.
    Family {
        /// The family's number.
        family: u16,
        /// The command.
        command: u8,
        /// Its attributes, for [`attributes`].
        attributes: &'a [u8],
    },
    /// Something of netlink's own that says nothing here.
    Other,
}

/// A message received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// The request's number, 0 for what was not asked for.
    pub sequence: u32,
    /// What it says.
    pub content: Content<'a>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Takes the first message off a datagram. `None` at its end.
///
/// # Errors
/// The rest is no message.
pub fn take_message<'a>(datagram: &mut &'a [u8]) -> Result<Option<Message<'a>>, Malformed> {
    if datagram.is_empty() {
        return Ok(None);
    }
    let length = u32_at(datagram, 0).ok_or(Malformed)? as usize;
    let message = datagram.get(..length).filter(|message| message.len() >= HEADER_BYTES).ok_or(Malformed)?;
    *datagram = datagram.get(padded(length)..).unwrap_or_default();
    let kind = u16_at(message, 4).ok_or(Malformed)?;
    let sequence = u32_at(message, 8).ok_or(Malformed)?;
    let payload = &message[HEADER_BYTES..];
    let content = match kind {
        KIND_ERROR => {
            let number = u32_at(payload, 0).ok_or(Malformed)?.cast_signed();
            Content::Result(number.checked_neg().ok_or(Malformed)?)
        }
        KIND_FAMILY_MIN.. => {
            let attributes = payload.get(FAMILY_HEADER_BYTES..).ok_or(Malformed)?;
            Content::Family { family: kind, command: payload[0], attributes }
        }
        _ => Content::Other,
    };
    Ok(Some(Message { sequence, content }))
}

/// The attributes of a message, or those nested in one: id and value.
///
/// # Errors
/// One of them is cut short.
pub fn attributes(mut bytes: &[u8]) -> Result<Vec<(u16, &[u8])>, Malformed> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(u16_at(bytes, 0).ok_or(Malformed)?);
        let id = u16_at(bytes, 2).ok_or(Malformed)?;
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length).ok_or(Malformed)?;
        found.push((id & ATTRIBUTE_ID_MASK, value));
        bytes = bytes.get(padded(length)..).unwrap_or_default();
    }
    Ok(found)
}

/// The value of attribute `id`; `None` where it is missing.
///
/// # Errors
/// The attributes are malformed.
pub fn attribute(bytes: &[u8], id: u16) -> Result<Option<&[u8]>, Malformed> {
    Ok(attributes(bytes)?.into_iter().find(|(found, _)| *found == id).map(|(_, value)| value))
}

/// A 16-bit value; `None` where it has another length.
#[must_use]
pub fn as_u16(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_ne_bytes)
}

/// A 32-bit value; `None` where it has another length.
#[must_use]
pub fn as_u32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn family(message: Message<'_>) -> (u16, u8, &[u8]) {
        match message.content {
            Content::Family { family, command, attributes } => (family, command, attributes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_has_the_kernels_layout() {
        let sockets = Attributes::default().nested(1, &Attributes::default().u32(1, 7));
        let attributes = Attributes::default().u32(1, 3).u64(2, 1 << 20).nested(7, &sockets).text(10, "abcd");
        #[rustfmt::skip]
        let wanted = [
            68, 0, 0, 0,  0x1c, 0,  5, 0,  9, 0, 0, 0,  0, 0, 0, 0, // length, kind, request and ack, sequence, port
            1, 1, 0, 0, // command, version
            8, 0, 1, 0,  3, 0, 0, 0,
            12, 0, 2, 0,  0, 0, 16, 0, 0, 0, 0, 0,
            16, 0, 7, 0x80,  12, 0, 1, 0x80,  8, 0, 1, 0,  7, 0, 0, 0,
            9, 0, 10, 0,  b'a', b'b', b'c', b'd', 0, 0, 0, 0, // padded
        ];
        let mut bytes = encode(0x1c, 1, 1, 9, &attributes);
        assert_eq!(bytes, wanted);
        bytes.truncate(67);
        assert_eq!(take_message(&mut &bytes[..]), Err(Malformed));
    }

    #[test]
    fn what_is_encoded_is_read_again() {
        let inner = Attributes::default().text(1, "nbd_mc_group").u32(2, 11);
        let request = encode(0x1d, 4, 1, 77, &Attributes::default().u32(1, 5).nested(7, &inner));
        let two = [request.clone(), request].concat();
        let mut rest = &two[..];
        for _ in 0..2 {
            let message = take_message(&mut rest).unwrap().unwrap();
            assert_eq!(message.sequence, 77);
            let (kind, command, body) = family(message);
            assert_eq!((kind, command), (0x1d, 4));
            assert_eq!(attribute(body, 1).unwrap().and_then(as_u32), Some(5));
            assert_eq!(attribute(body, 2), Ok(None));
            let nested = attribute(body, 7).unwrap().unwrap();
            assert_eq!(attribute(nested, 1).unwrap(), Some(&b"nbd_mc_group\0"[..]));
            assert_eq!(attribute(nested, 2).unwrap().and_then(as_u32), Some(11));
        }
        assert_eq!(take_message(&mut rest), Ok(None));
    }

    /// A message of netlink's own.
    fn netlink_message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn results_are_errnos_or_done() {
        for (number, wanted) in [(0i32, 0), (-16, 16), (-1, 1)] {
            let bytes = netlink_message(KIND_ERROR, &number.to_ne_bytes());
            let message = take_message(&mut &bytes[..]).unwrap().unwrap();
            assert_eq!(message.content, Content::Result(wanted));
        }
        let lowest = netlink_message(KIND_ERROR, &i32::MIN.to_ne_bytes());
        assert_eq!(take_message(&mut &lowest[..]), Err(Malformed));
        let done = netlink_message(3, &[]);
        assert_eq!(take_message(&mut &done[..]).unwrap().unwrap().content, Content::Other);
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let request = encode(0x1d, 4, 1, 77, &Attributes::default().u32(1, 5).u64(2, 6));
        for length in 1..request.len() {
            assert_eq!(take_message(&mut &request[..length]), Err(Malformed), "{length}");
        }
        // A length that does not cover its own header must not be taken for a message that never ends.
        for length in 0..HEADER_BYTES as u32 {
            let mut lying = request.clone();
            lying[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(take_message(&mut &lying[..]), Err(Malformed), "{length}");
        }
        let good = &request[HEADER_BYTES + FAMILY_HEADER_BYTES..];
        for length in 0..ATTRIBUTE_HEADER_BYTES as u16 {
            let mut lying = good.to_vec();
            lying[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&lying), Err(Malformed), "{length}");
        }
        assert_eq!(attributes(&good[..good.len() - 1]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u32..220, kind in 0u16..20) {
            let _ = attributes(&bytes);
            let mut framed = bytes.clone();
            if framed.len() >= 6 {
                framed[..4].copy_from_slice(&length.to_ne_bytes());
                framed[4..6].copy_from_slice(&kind.to_ne_bytes());
            }
            for datagram in [&bytes, &framed] {
                let mut rest = &datagram[..];
                while let Ok(Some(message)) = take_message(&mut rest) {
                    if let Content::Family { attributes: body, .. } = message.content {
                        let _ = attributes(body);
                    }
                }
            }
        }
    }
}
