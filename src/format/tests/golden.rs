//! Golden bytes: files that were made from the byte map by other code than ours.
