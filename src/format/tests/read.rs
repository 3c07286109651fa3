//! Reading replicas: which slot counts, what damage is survived, what is refused.
