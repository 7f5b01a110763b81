//! Text from blocks and peers, made safe to show. Pure.
//!
//! What a block prints may hold terminal escapes, control characters and broken UTF-8. Files keep it byte for byte;
//! whatever is *shown*, in a status, an error or a log line, passes through here.

/// At most `limit` bytes of `bytes` as printable text: broken UTF-8 becomes U+FFFD, control characters are escaped, and a
/// cut is marked by `…`.
#[must_use]
pub fn printable(bytes: &[u8], limit: usize) -> String {
    let mut out = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        let before = out.len();
        match c {
            '\t' => out.push(' '),
            c if c.is_control() || is_direction_override(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
        if out.len() > limit {
            out.truncate(before);
            out.push('…');
            break;
        }
    }
    out
}

/// Characters that reorder what stands around them: they can make a line say something else than it holds.
fn is_direction_override(c: char) -> bool {
    matches!(c, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

/// Bytes as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// `1 task`, `2 tasks`: a count with its noun.
#[must_use]
pub fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// A duration as people say it: `0.2 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
#[must_use]
pub fn spoken(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A text as words, split as a shell would: at spaces, but for those in quotes or behind a backslash.
///
/// # Errors
/// When a quote is not closed.
pub fn words(text: &str) -> Result<Vec<String>, UnclosedQuote> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(characters.next()),
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    if quote.is_some() { Err(UnclosedQuote) } else { Ok(words) }
}

/// A quote is not closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a quote is not closed")]
pub struct UnclosedQuote;

/// A word as a shell takes it literally, in quotes where it needs them.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Words as one line, from which [`words`] makes them again.
#[must_use]
pub fn line<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// The word of `words` that is nearest to `word`, if any is near enough to be what was meant.
#[must_use]
pub fn nearest<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    words
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|&(distance, candidate)| distance <= 1 + candidate.chars().count() / 4)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Edit distance with insertions, deletions, substitutions and swapped neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let mut cost = (row[j] + usize::from(x != y)).min(row[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && x == b[j - 1] && a[i - 1] == y {
                cost = cost.min(before[j - 1] + 1);
            }
            next.push(cost);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_broken_text_are_made_visible() {
        assert_eq!(printable(b"\x1b[31mred\xff\n", 100), "\\u{1b}[31mred\u{fffd}\\n");
    }

    #[test]
    fn a_cut_is_marked() {
        assert_eq!(printable(b"abcdef", 3), "abc…");
        assert_eq!(printable(b"abc", 3), "abc");
    }

    #[test]
    fn a_line_is_split_as_a_shell_would_and_put_together_again() {
        let all = ["ip", "netns", "it's", "", "a b", "\"x\" $y", "back\\slash", "--k=v", "line\nbreak"];
        let line = line(all);
        assert_eq!(line, "ip netns 'it'\\''s' '' 'a b' '\"x\" $y' 'back\\slash' --k=v 'line\nbreak'");
        assert_eq!(words(&line).unwrap(), all);
        assert_eq!(words("a\\ b  \"c'd\"").unwrap(), ["a b", "c'd"]);
        assert_eq!(words("it's"), Err(UnclosedQuote));
    }

    #[test]
    fn the_nearest_word_is_found_only_when_it_is_near() {
        let words = ["timeout", "image", "host"];
        assert_eq!(nearest("timout", words), Some("timeout"));
        assert_eq!(nearest("hots", words), Some("host"));
        assert_eq!(nearest("zebra", words), None);
        assert_eq!(nearest("tsl", ["tls", "unix"]), Some("tls"));
    }
}
