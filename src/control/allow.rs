//! Who may connect over TCP: `--allow`.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

/// Addresses that may connect: one, or a network of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed(IpNet);

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = match text.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address),
            Err(_) => text.parse::<IpNet>().map_err(|_| {
                format!("`{text}` is no address and no network; give one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
            })?,
        };
        Ok(Self(unmapped(network)))
    }
}

/// An IPv4 network written in IPv6 (`::ffff:192.0.2.0/120`) as the IPv4 network that it is.
fn unmapped(network: IpNet) -> IpNet {
    let IpNet::V6(v6) = network else { return network };
    let (Some(v4), Some(prefix)) = (v6.network().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) else {
        return network;
    };
    Ipv4Net::new(v4, prefix).map_or(network, IpNet::V4)
}

/// Every address that may connect; an empty list is everybody.
#[derive(Clone, Debug, Default)]
pub struct AllowList(pub Vec<Allowed>);

impl AllowList {
    /// Whether a client at `address` may connect. An IPv4 client of an IPv6 listener is an IPv4 client.
    #[must_use]
    pub fn admits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.is_empty() || self.0.iter().any(|allowed| allowed.0.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(networks: &[&str]) -> AllowList {
        AllowList(networks.iter().map(|network| network.parse().unwrap()).collect())
    }

    #[test]
    fn addresses_and_networks_admit_their_own() {
        for (networks, address, admitted) in [
            (&[][..], "203.0.113.9", true),
            (&["192.0.2.7"], "192.0.2.7", true),
            (&["192.0.2.7"], "192.0.2.8", false),
            (&["192.0.2.0/24"], "192.0.2.255", true),
            (&["192.0.2.9/24"], "192.0.2.1", true),
            (&["192.0.2.0/24"], "192.0.3.0", false),
            (&["192.0.2.0/24", "2001:db8::/32"], "2001:db8::1", true),
            (&["2001:db8::/32"], "2001:db9::1", false),
            (&["2001:db8::1"], "2001:db8::1", true),
            // An IPv6 list says nothing of IPv4, and the other way round.
            (&["::/0"], "192.0.2.1", false),
            (&["0.0.0.0/0"], "2001:db8::1", false),
            // The same client seen through an IPv6 socket.
            (&["192.0.2.0/24"], "::ffff:192.0.2.9", true),
            (&["::ffff:192.0.2.0/120"], "192.0.2.9", true),
            (&["::ffff:192.0.2.0/120"], "192.0.3.9", false),
            (&["::ffff:0:0/90"], "192.0.2.9", false),
        ] {
            assert_eq!(list(networks).admits(address.parse().unwrap()), admitted, "{networks:?} {address}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "10.0.0", "10.0.0.0/33", "::/129", "localhost", "10.0.0.0/", "10.0.0.1:10809", "[::1]"]
        {
            assert!(text.parse::<Allowed>().unwrap_err().contains("192.0.2.0/24"), "{text}");
        }
    }
}
