//! Bytes that travel, and how those that arrived differ from them. Pure.

/// Bytes that look like nothing: every value occurs, no stretch repeats, and another seed gives others.
pub(super) fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).flatten().take(length).collect();
    // A long line of nothing but ends of lines, and one without any: what cuts output into lines must give it back whole.
    let quarter = length / 4;
    bytes[quarter..quarter + quarter / 8].fill(b'\n');
    bytes[2 * quarter..2 * quarter + quarter / 2].fill(b'x');
    bytes
}

/// What came instead of what was sent.
pub(super) fn compare(what: &str, sent: &[u8], came: &[u8]) -> Result<(), String> {
    if sent == came {
        return Ok(());
    }
    let first =
        sent.iter().zip(came).position(|(sent, came)| sent != came).unwrap_or(sent.len().min(came.len()));
    Err(format!(
        "{what} has {} bytes instead of {}, and differs first at byte {first}",
        came.len(),
        sent.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_occurs_and_seeds_differ() {
        let sample = bytes(1, 1 << 20);
        assert!((0..=255).all(|byte| sample.contains(&byte)));
        assert_ne!(sample, bytes(2, 1 << 20));
        assert_eq!(sample, bytes(1, 1 << 20));
    }

    #[test]
    fn a_difference_is_told_with_its_place() {
        let told = |sent: &[u8], came: &[u8]| compare("stdout", sent, came).unwrap_err();
        assert_eq!(told(b"abc", b"ab"), "stdout has 2 bytes instead of 3, and differs first at byte 2");
        assert_eq!(told(b"abc", b"axc"), "stdout has 3 bytes instead of 3, and differs first at byte 1");
        assert_eq!(compare("stdout", b"abc", b"abc"), Ok(()));
    }
}
