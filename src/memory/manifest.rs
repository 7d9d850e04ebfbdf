//! The form of the small files that are the truth about cubes: a manifest per version, a tombstone per deleted cube, and
//! a file per snapshot.
//!
//! ```text
//! {"format":1,"digest":"<BLAKE3 of the body, 64 hex digits>","body":{...}}
//! ```
//!
//! on one line, exactly so: the digest is over the bytes of the body as they stand, and is compared before any of it is
//! parsed. A file's name is made of the cube's id and version, so that no name a user chose ever becomes a path, and the
//! content must agree with it.

use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::acl::{Acl, Principal};
use super::cube::{Cube, CubeId, MAX_PARENTS};
use super::digest::Digest;
use super::name::{CubeName, Version};
use super::payload::Kind;
use super::snapshot::{Snapshot, SnapshotId};
use super::timestamp::Timestamp;
use crate::{Error, Result, invalid, malformed, unsupported};

/// The version of the format that is written, and the newest that is read.
const FORMAT: u32 = 1;
/// Longest file that is read or written.
pub(super) const MAX_FILE_BYTES: usize = 16 << 20;

const BEFORE_FORMAT: &str = "{\"format\":";
const BEFORE_DIGEST: &str = ",\"digest\":\"";
const BEFORE_BODY: &str = "\",\"body\":";
const BEHIND_BODY: &str = "}\n";

/// What is left of a deleted cube. It wins over every manifest of the same id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    /// Whose identity it was.
    pub id: CubeId,
    /// What it was called.
    pub name: CubeName,
    /// What it was.
    pub kind: Kind,
    /// Its last version.
    pub version: Version,
    /// The cubes it was made from.
    pub parents: Vec<CubeId>,
    /// Whose it was.
    pub owner: Principal,
    /// Who else could see it, and sees that it is gone.
    pub acl: Acl,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it went.
    pub deleted_at: Timestamp,
    /// Why.
    pub reason: Ending,
    /// Its blocks are to be overwritten. That is done when none of its manifests is there any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub erase_on_free: bool,
}

/// Why a cube ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Somebody deleted it.
    Deleted,
    /// Its lifetime was over.
    Expired,
}

/// The name of a file, from a cube's identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum FileName {
    Manifest(CubeId, Version),
    Tombstone(CubeId),
    Snapshot(SnapshotId),
}

impl Tombstone {
    /// What remains of `cube`.
    pub(super) fn of(cube: &Cube, deleted_at: Timestamp, reason: Ending) -> Self {
        Self {
            id: cube.id,
            name: cube.name.clone(),
            kind: cube.payload.kind(),
            version: cube.version,
            parents: cube.parents.clone(),
            owner: cube.governance.owner.clone(),
            acl: cube.governance.acl.clone(),
            created_at: cube.created_at,
            deleted_at,
            reason,
            erase_on_free: cube.governance.erase_on_free,
        }
    }
}

/// A manifest's bytes. Refused when they would be too many.
pub(super) fn encode_manifest(cube: &Cube) -> Result<Vec<u8>> {
    let bytes = seal(cube);
    match bytes.len() {
        0..=MAX_FILE_BYTES => Ok(bytes),
        len => Err(invalid!("the cube takes {len} bytes beside its blocks, {MAX_FILE_BYTES} are allowed; split it")),
    }
}

/// A tombstone's bytes.
pub(super) fn encode_tombstone(tombstone: &Tombstone) -> Vec<u8> {
    seal(tombstone)
}

/// Reads a manifest that was found under `name`.
pub(super) fn decode_manifest(name: FileName, bytes: &[u8]) -> Result<Cube> {
    let cube: Cube = open(bytes)?;
    check_name(name, FileName::Manifest(cube.id, cube.version))?;
    if cube.parents.len() > MAX_PARENTS {
        return Err(malformed!("{} parents, {MAX_PARENTS} are allowed", cube.parents.len()));
    }
    Ok(cube)
}

/// Reads a tombstone that was found under `name`.
pub(super) fn decode_tombstone(name: FileName, bytes: &[u8]) -> Result<Tombstone> {
    let tombstone: Tombstone = open(bytes)?;
    check_name(name, FileName::Tombstone(tombstone.id))?;
    Ok(tombstone)
}

/// A snapshot's bytes. Refused when they would be too many.
pub(super) fn encode_snapshot(snapshot: &Snapshot) -> Result<Vec<u8>> {
    let bytes = seal(snapshot);
    match bytes.len() {
        0..=MAX_FILE_BYTES => Ok(bytes),
        _ => Err(invalid!("the snapshot has {} cubes, too many for a file; take several", snapshot.cubes.len())),
    }
}

/// Reads a snapshot that was found under `name`.
pub(super) fn decode_snapshot(name: FileName, bytes: &[u8]) -> Result<Snapshot> {
    let snapshot: Snapshot = open(bytes)?;
    check_name(name, FileName::Snapshot(snapshot.id))?;
    Ok(snapshot)
}

fn check_name(found: FileName, wanted: FileName) -> Result<()> {
    if found == wanted {
        Ok(())
    } else {
        Err(malformed!("the file is called {found}, its content belongs to {wanted}"))
    }
}

fn seal<T: Serialize>(body: &T) -> Vec<u8> {
    let body = serde_json::to_vec(body).expect("headers have text keys only, which JSON can spell");
    let digest = Digest::of(&body);
    let mut bytes = format!("{BEFORE_FORMAT}{FORMAT}{BEFORE_DIGEST}{digest}{BEFORE_BODY}").into_bytes();
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(BEHIND_BODY.as_bytes());
    bytes
}

fn open<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let (format, rest) = format_of(bytes).ok_or_else(|| malformed!("it does not begin like a mneme file"))?;
    if format != FORMAT {
        return Err(unsupported!("it has format {format}, this program reads format {FORMAT}; use a newer one"));
    }
    let (digest, body) = parts_of(rest).ok_or_else(|| malformed!("it ends early or has no digest"))?;
    if Digest::of(body) != digest {
        return Err(malformed!("its digest is not that of its content"));
    }
    serde_json::from_slice(body).map_err(|error| malformed!("its content is not understood: {error}"))
}

fn format_of(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let rest = bytes.strip_prefix(BEFORE_FORMAT.as_bytes())?;
    let end = rest.iter().take(10).position(|byte| *byte == b',')?;
    let format = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
    Some((format, &rest[end..]))
}

fn parts_of(bytes: &[u8]) -> Option<(Digest, &[u8])> {
    let rest = bytes.strip_prefix(BEFORE_DIGEST.as_bytes())?;
    let (digest, rest) = rest.split_at_checked(64)?;
    let body = rest.strip_prefix(BEFORE_BODY.as_bytes())?.strip_suffix(BEHIND_BODY.as_bytes())?;
    Some((std::str::from_utf8(digest).ok()?.parse().ok()?, body))
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(id, version) => write!(f, "{id}.{version}.json"),
            Self::Tombstone(id) => write!(f, "{id}.tombstone.json"),
            Self::Snapshot(id) => write!(f, "{id}.snapshot.json"),
        }
    }
}

impl FromStr for FileName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('.').collect();
        let name = match parts[..] {
            [id, "tombstone", "json"] => Some(Self::Tombstone(id.parse()?)),
            [id, "snapshot", "json"] => Some(Self::Snapshot(id.parse()?)),
            [id, version, "json"] => {
                let version = version.parse().ok().and_then(Version::new);
                version.map(|version| id.parse().map(|id| Self::Manifest(id, version))).transpose()?
            }
            _ => None,
        };
        // "+1" and "01" are numbers, but no spelling of ours.
        name.filter(|name| name.to_string() == text).ok_or_else(|| malformed!("the file has no name of a cube's file"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::samples;
    use super::*;

    fn read(bytes: &[u8]) -> Result<Cube> {
        let cube = samples::activation("ana/notes");
        decode_manifest(FileName::Manifest(cube.id, cube.version), bytes)
    }

    #[test]
    fn manifests_and_tombstones_come_back() {
        for cube in [
            samples::activation("ana/notes"),
            samples::plaintext("ana/text"),
            samples::conversation("ana/talk"),
            samples::parameter("ana/style"),
        ] {
            let name = FileName::Manifest(cube.id, cube.version);
            assert_eq!(name.to_string().parse::<FileName>().unwrap(), name);
            let bytes = encode_manifest(&cube).unwrap();
            assert_eq!(decode_manifest(name, &bytes).unwrap(), cube);
            assert!(serde_json::from_slice::<serde_json::Value>(&bytes).unwrap().is_object(), "it is plain JSON too");
            let tombstone = Tombstone::of(&cube, cube.updated_at, Ending::Deleted);
            let name = FileName::Tombstone(cube.id);
            assert_eq!(decode_tombstone(name, &encode_tombstone(&tombstone)).unwrap(), tombstone);
            assert_eq!(name.to_string().parse::<FileName>().unwrap(), name);
        }
    }

    #[test]
    fn two_files_that_changed_places_are_found() {
        let (one, other) = (samples::activation("ana/a"), samples::plaintext("ana/b"));
        let error = decode_manifest(FileName::Manifest(other.id, other.version), &encode_manifest(&one).unwrap());
        assert!(error.unwrap_err().to_string().contains(&one.id.to_string()));
        let tombstone = encode_tombstone(&Tombstone::of(&one, one.updated_at, Ending::Expired));
        assert!(decode_tombstone(FileName::Tombstone(other.id), &tombstone).is_err());
        assert!(decode_manifest(FileName::Manifest(one.id, one.version), &tombstone).is_err());
    }

    #[test]
    fn a_newer_format_is_named() {
        let bytes = encode_manifest(&samples::activation("ana/notes")).unwrap();
        let newer = String::from_utf8(bytes).unwrap().replacen("\"format\":1", "\"format\":2", 1);
        let error = read(newer.as_bytes()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("format 2")), "{error}");
    }

    #[test]
    fn content_that_breaks_a_rule_is_refused_though_its_digest_is_right() {
        let cube = samples::activation("ana/notes");
        for (wanted, written) in [
            ("\"ana/notes\"", "\"../notes\""),
            ("\"version\":1", "\"version\":0"),
            ("\"priority\":5", "\"priority\":50"),
            ("\"frozen\":false", "\"frozen\":false,\"extra\":1"),
            ("\"visibility\":\"private\"", "\"visibility\":\"open\""),
            ("\"token_ids\":[", "\"token_ids\":[-1,"),
            ("\"prefix\"", "\"suffix\""),
        ] {
            let body = serde_json::to_string(&cube).unwrap();
            assert!(body.contains(wanted), "{body}");
            let body = body.replacen(wanted, written, 1);
            let digest = Digest::of(body.as_bytes());
            let text = format!("{{\"format\":1,\"digest\":\"{digest}\",\"body\":{body}}}\n");
            let error = decode_manifest(FileName::Manifest(cube.id, cube.version), text.as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Format(_)), "{written}: {error}");
        }
    }

    #[test]
    fn deep_nesting_ends_with_an_error() {
        let body = format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
        let digest = Digest::of(body.as_bytes());
        let text = format!("{{\"format\":1,\"digest\":\"{digest}\",\"body\":{body}}}\n");
        assert!(read(text.as_bytes()).is_err());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_found() {
        let cube = samples::activation("ana/notes");
        let name = FileName::Manifest(cube.id, cube.version);
        let bytes = encode_manifest(&cube).unwrap();
        for len in 0..bytes.len() {
            assert!(decode_manifest(name, &bytes[..len]).is_err(), "cut to {len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_manifest(name, &flipped).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), body in "\\PC{0,80}", name in "\\PC{0,60}") {
            prop_assert!(read(&bytes).is_err());
            let digest = Digest::of(body.as_bytes());
            let sealed = format!("{{\"format\":1,\"digest\":\"{digest}\",\"body\":{body}}}\n");
            prop_assert!(read(sealed.as_bytes()).is_err());
            prop_assert!(name.parse::<FileName>().is_err());
        }
    }
}
