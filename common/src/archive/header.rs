//! One entry of an archive as bytes, and back. Pure.
//!
//! What is written is always the same for the same entry: no owner, no time, mode 0755 or 0644. What is read is held to
//! that form: a second way of saying something is refused, because two readers could understand it differently.

use crate::limits;

/// The unit of a tar archive.
pub(super) const BLOCK_BYTES: usize = 512;
/// The largest size that eleven octal digits can say.
const USTAR_SIZE_MAX: u64 = 0o777_7777_7777;
/// A PAX header holds a path and a link target at most.
pub(super) const PAX_BYTES_MAX: u64 = 4 * limits::PATH_BYTES_MAX as u64;

/// Why an entry is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The header's checksum is wrong.
    #[error("its header does not match its checksum")]
    Checksum,
    /// Not the format that is written here.
    #[error("it is not in the ustar format")]
    Format,
    /// A number that is not written in octal digits.
    #[error("its {0} is not an octal number")]
    Number(&'static str),
    /// Bytes behind the end of a text.
    #[error("there are bytes behind its {0}")]
    HiddenBytes(&'static str),
    /// A type that is never in an archive of results.
    #[error("it is {0}")]
    Type(&'static str),
    /// A type that nobody knows.
    #[error("its type {0:#04x} is unknown")]
    UnknownType(u8),
    /// No name.
    #[error("its name is empty")]
    EmptyName,
    /// A name from the root.
    #[error("its name is absolute")]
    Absolute,
    /// A component that is empty, `.` or `..`.
    #[error("its name has an empty component, a `.` or a `..`")]
    Component,
    /// A name, a component or a link target that is too long.
    #[error("its name or link target is too long")]
    TooLong,
    /// Too many directories.
    #[error("it is deeper than 64 directories")]
    TooDeep,
    /// A NUL inside a name.
    #[error("its name holds a NUL")]
    Nul,
    /// Not where results are.
    #[error("results are `whiteboard` and `data` alone")]
    Place,
    /// The whiteboard is no regular file of a sane size, or data no directory.
    #[error("it has the wrong type or size for its name")]
    WrongRoot,
    /// The same name twice, or a file where a directory was.
    #[error("its name stands twice")]
    Twice,
    /// A directory that is not in the archive before it.
    #[error("its directory is not in the archive before it")]
    NoDirectory,
    /// A directory that is a file or a link.
    #[error("a directory on its way is a file or a link")]
    NotDirectory,
    /// A link that leaves its directory.
    #[error("its link target leaves `data`")]
    LinkLeaves,
    /// A target where there is no link.
    #[error("it has a link target without being a link")]
    StrayLink,
    /// Content where there can be none.
    #[error("it has content, and its type has none")]
    StrayContent,
    /// Two sizes.
    #[error("its two headers give different sizes")]
    TwoSizes,
    /// A PAX header that cannot be read.
    #[error("its PAX header is malformed")]
    Pax,
    /// A key of a PAX header that is never in an archive of results.
    #[error("its PAX header has the key `{0}`")]
    PaxKey(String),
    /// A PAX header of nothing.
    #[error("a PAX header is not followed by its entry")]
    PaxAlone,
    /// Padding that is not zero.
    #[error("its padding is not zero")]
    Padding,
    /// Too many entries.
    #[error("the archive has more than 1,000,000 entries")]
    TooMany,
    /// Too many bytes.
    #[error("the archive is larger than 64 GiB")]
    TooLarge,
    /// One end block alone.
    #[error("only half of the end mark is there")]
    HalfEnd,
    /// Bytes behind the end.
    #[error("there are bytes behind the end mark")]
    Trailing,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File { executable: bool },
    Directory,
    Symlink,
}

/// An entry before its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Path without a slash at its end.
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) size: u64,
    pub(super) link: Vec<u8>,
}

/// Bytes between the end of `size` bytes of content and the next header.
pub(super) fn padding(size: u64) -> usize {
    let block = BLOCK_BYTES as u64;
    usize::try_from((block - size % block) % block).expect("less than a block")
}

/// Writes the headers of an entry.
pub(super) fn encode(entry: &Entry, out: &mut Vec<u8>) {
    let mut path = entry.path.clone();
    if entry.kind == Kind::Directory {
        path.push(b'/');
    }
    let split = split_path(&path);
    let mut pax = Vec::new();
    if split.is_none() {
        pax_record(b"path", &path, &mut pax);
    }
    if entry.link.len() > 100 {
        pax_record(b"linkpath", &entry.link, &mut pax);
    }
    if entry.size > USTAR_SIZE_MAX {
        pax_record(b"size", entry.size.to_string().as_bytes(), &mut pax);
    }
    if !pax.is_empty() {
        let size = u64::try_from(pax.len()).expect("a few KiB");
        out.extend_from_slice(&block(b"", b"PaxHeader", b'x', 0o644, size, b""));
        out.extend_from_slice(&pax);
        out.resize(out.len() + padding(size), 0);
    }
    let (prefix, name) = split.unwrap_or((b"", b"PaxName"));
    let (flag, mode) = match entry.kind {
        Kind::File { executable: true } => (b'0', 0o755),
        Kind::File { executable: false } => (b'0', 0o644),
        Kind::Directory => (b'5', 0o755),
        Kind::Symlink => (b'2', 0o777),
    };
    let size = if entry.size > USTAR_SIZE_MAX { 0 } else { entry.size };
    let link = if entry.link.len() > 100 { &b"PaxLink"[..] } else { &entry.link };
    out.extend_from_slice(&block(prefix, name, flag, mode, size, link));
}

/// A path as the two fields of ustar, when it fits.
fn split_path(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= 100 {
        return Some((b"", path));
    }
    // The slash between the two is not stored. The one at the end of a directory's name cannot be it.
    let last = path.len() - 1;
    let at = (path.len() - 101..last).find(|&at| path[at] == b'/')?;
    (at <= 155).then(|| (&path[..at], &path[at + 1..]))
}

fn pax_record(key: &[u8], value: &[u8], out: &mut Vec<u8>) {
    // The length counts its own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn block(prefix: &[u8], name: &[u8], flag: u8, mode: u32, size: u64, link: &[u8]) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name);
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[flag]);
    put(157, link);
    put(257, b"ustar\x0000");
    put(329, b"0000000");
    put(337, b"0000000");
    put(345, prefix);
    let sum = checksum(&block);
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn checksum(block: &[u8; BLOCK_BYTES]) -> u32 {
    let counted = block[..148].iter().chain(&block[156..]);
    counted.map(|&byte| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ')
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A PAX header of this many bytes, for the entry that follows.
    Pax(u64),
    /// An entry.
    Entry(Entry),
}

/// What a PAX header says of the entry that follows.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

/// The name in a header, as far as it can be read: for errors.
pub(super) fn shown_name(block: &[u8; BLOCK_BYTES]) -> String {
    let name = &block[..100];
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    crate::text::printable(&name[..end], limits::PATH_COMPONENT_BYTES_MAX)
}

/// Reads a header, together with the PAX header before it.
pub(super) fn decode(block: &[u8; BLOCK_BYTES], pax: Option<Pax>) -> Result<Header, Refusal> {
    if octal(&block[148..156], "checksum").ok() != Some(u64::from(checksum(block))) {
        return Err(Refusal::Checksum);
    }
    if &block[257..265] != b"ustar\x0000" {
        return Err(Refusal::Format);
    }
    let kind = match block[156] {
        b'0' => Kind::File { executable: octal(&block[100..108], "mode")? & 0o111 != 0 },
        b'5' => Kind::Directory,
        b'2' => Kind::Symlink,
        b'x' => {
            let size = octal(&block[124..136], "size")?;
            return match pax {
                Some(_) => Err(Refusal::PaxAlone),
                None if size == 0 || size > PAX_BYTES_MAX => Err(Refusal::Pax),
                None => Ok(Header::Pax(size)),
            };
        }
        other => return Err(refused_type(other)),
    };
    let pax = pax.unwrap_or_default();
    let size = match (octal(&block[124..136], "size")?, pax.size) {
        (size, None) => size,
        (0, Some(size)) if size > USTAR_SIZE_MAX => size,
        (size, Some(again)) if size == again => size,
        _ => return Err(Refusal::TwoSizes),
    };
    let link = match pax.link {
        Some(link) => link,
        None => text(&block[157..257], "link target")?.to_vec(),
    };
    let mut path = match pax.path {
        Some(path) => path,
        None => {
            let (prefix, name) = (text(&block[345..500], "name's prefix")?, text(&block[..100], "name")?);
            if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
        }
    };
    if block[500..].iter().any(|&byte| byte != 0) {
        return Err(Refusal::HiddenBytes("header"));
    }
    if kind == Kind::Directory && path.len() > 1 && path.ends_with(b"/") {
        path.pop();
    }
    if kind != Kind::Symlink && !link.is_empty() {
        return Err(Refusal::StrayLink);
    }
    if !matches!(kind, Kind::File { .. }) && size != 0 {
        return Err(Refusal::StrayContent);
    }
    Ok(Header::Entry(Entry { path, kind, size, link }))
}

fn refused_type(flag: u8) -> Refusal {
    match flag {
        0 => Refusal::Type("of the old format"),
        b'1' => Refusal::Type("a hard link"),
        b'3' => Refusal::Type("a character device"),
        b'4' => Refusal::Type("a block device"),
        b'6' => Refusal::Type("a fifo"),
        b'7' => Refusal::Type("a contiguous file"),
        b'g' => Refusal::Type("a global PAX header"),
        b'L' | b'K' => Refusal::Type("a GNU long name"),
        b'S' => Refusal::Type("a GNU sparse file"),
        b'D' | b'M' | b'N' | b'V' => Refusal::Type("a GNU extension"),
        other => Refusal::UnknownType(other),
    }
}

/// A field of octal digits, ended by NULs or blanks.
fn octal(field: &[u8], what: &'static str) -> Result<u64, Refusal> {
    let digits = field.iter().take_while(|byte| (b'0'..=b'7').contains(byte)).count();
    if digits == 0 || field[digits..].iter().any(|&byte| byte != 0 && byte != b' ') {
        return Err(Refusal::Number(what));
    }
    Ok(field[..digits].iter().fold(0, |number, &digit| number << 3 | u64::from(digit - b'0')))
}

/// A field of text, filled with NULs.
fn text<'a>(field: &'a [u8], what: &'static str) -> Result<&'a [u8], Refusal> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    if field[end..].iter().any(|&byte| byte != 0) {
        return Err(Refusal::HiddenBytes(what));
    }
    Ok(&field[..end])
}

/// Reads the records of a PAX header.
pub(super) fn decode_pax(mut content: &[u8]) -> Result<Pax, Refusal> {
    let mut pax = Pax::default();
    while !content.is_empty() {
        let blank = content.iter().take(6).position(|&byte| byte == b' ').ok_or(Refusal::Pax)?;
        let length = decimal(&content[..blank]).ok_or(Refusal::Pax)?;
        let length = usize::try_from(length).map_err(|_| Refusal::Pax)?;
        if length <= blank + 1 || length > content.len() || content[length - 1] != b'\n' {
            return Err(Refusal::Pax);
        }
        let record = &content[blank + 1..length - 1];
        let equals = record.iter().position(|&byte| byte == b'=').ok_or(Refusal::Pax)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if value.is_empty() {
            return Err(Refusal::Pax);
        }
        let twice = match key {
            b"path" => pax.path.replace(value.to_vec()).is_some(),
            b"linkpath" => pax.link.replace(value.to_vec()).is_some(),
            b"size" => pax.size.replace(decimal(value).ok_or(Refusal::Number("size"))?).is_some(),
            _ => return Err(Refusal::PaxKey(crate::text::printable(key, 64))),
        };
        if twice {
            return Err(Refusal::Pax);
        }
        content = &content[length..];
    }
    Ok(pax)
}

/// Decimal digits without a sign and without zeros before them: one spelling a number.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) || (digits.len() > 1 && digits[0] == b'0')
    {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Checks the name of an entry and splits it.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, Refusal> {
    if path.is_empty() {
        return Err(Refusal::EmptyName);
    }
    if path[0] == b'/' {
        return Err(Refusal::Absolute);
    }
    if path.len() > limits::PATH_BYTES_MAX {
        return Err(Refusal::TooLong);
    }
    if path.contains(&0) {
        return Err(Refusal::Nul);
    }
    let components: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    if components.len() > limits::PATH_DEPTH_MAX {
        return Err(Refusal::TooDeep);
    }
    for component in &components {
        if component.is_empty() || matches!(*component, b"." | b"..") {
            return Err(Refusal::Component);
        }
        if component.len() > limits::PATH_COMPONENT_BYTES_MAX {
            return Err(Refusal::TooLong);
        }
    }
    Ok(components)
}

/// Whether a link in a directory that lies `depth` directories below `data` stays inside `data`, whatever other links
/// that pass this test are on its way. So `..` may stand at the beginning alone: behind a name it would lead to the parent
/// of wherever a link of that name points to.
pub(super) fn link_stays_inside(depth: usize, target: &[u8]) -> bool {
    if target.is_empty() || target[0] == b'/' || target.len() > limits::PATH_BYTES_MAX || target.contains(&0)
    {
        return false;
    }
    let (mut ups, mut in_names) = (0, false);
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if in_names => return false,
            b".." => ups += 1,
            _ => in_names = true,
        }
    }
    ups <= depth
}
