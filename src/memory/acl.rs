//! Who may do what with a cube. Knows principals by name only; who a caller is, the server finds out.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, invalid};

/// Longest name of a principal, in bytes.
const MAX_PRINCIPAL_BYTES: usize = 128;
/// Most principals in one list.
const MAX_LISTED: usize = 256;

/// Somebody who asks: 1 to 128 visible ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Principal(String);

/// What one wants to do with a cube.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// See it, use it, fork it.
    Read,
    /// Append, pin, freeze, and change what is said about it.
    Write,
    /// Change who may read and write.
    Share,
    /// Rename and delete: the owner alone.
    Own,
}

/// Who else than the owner may do what. Writing and sharing include reading.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "AclLists", into = "AclLists")]
pub enum Acl {
    /// Nobody.
    #[default]
    Private,
    /// Those in the lists.
    Shared(Grants),
    /// Everybody reads; the lists say who does more.
    Public(Grants),
}

/// The lists of a cube that is not private, each sorted and without repetition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grants {
    read: Vec<Principal>,
    write: Vec<Principal>,
    share: Vec<Principal>,
}

/// An [`Acl`] as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclLists {
    /// How open the cube is.
    pub visibility: Visibility,
    /// Who may see and use it.
    #[serde(default)]
    pub read: Vec<Principal>,
    /// Who may change it.
    #[serde(default)]
    pub write: Vec<Principal>,
    /// Who may change these lists.
    #[serde(default)]
    pub share: Vec<Principal>,
}

/// How open a cube is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// To its owner.
    #[default]
    Private,
    /// To those it names.
    Shared,
    /// To everybody.
    Public,
}

impl Principal {
    /// Who everybody is on a server without API keys.
    pub fn local() -> Self {
        Self("local".to_owned())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Acl {
    /// Whether somebody who is not the owner may have `access`.
    fn grants(&self, principal: &Principal, access: Access) -> bool {
        let (grants, everybody_reads) = match self {
            Self::Private => return false,
            Self::Shared(grants) => (grants, false),
            Self::Public(grants) => (grants, true),
        };
        let has = |list: &[Principal]| list.binary_search(principal).is_ok();
        match access {
            Access::Read => everybody_reads || has(&grants.read) || has(&grants.write) || has(&grants.share),
            Access::Write => has(&grants.write),
            Access::Share => has(&grants.share),
            Access::Own => false,
        }
    }

    /// Whether `principal` may have `access` to what `owner` owns.
    pub fn allows(&self, owner: &Principal, principal: &Principal, access: Access) -> bool {
        owner == principal || self.grants(principal, access)
    }
}

impl TryFrom<AclLists> for Acl {
    type Error = Error;

    fn try_from(lists: AclLists) -> Result<Self> {
        let AclLists { visibility, read, write, share } = lists;
        let grants = Grants { read: sorted(read)?, write: sorted(write)?, share: sorted(share)? };
        match visibility {
            Visibility::Private if grants == Grants::default() => Ok(Self::Private),
            Visibility::Private => Err(invalid!(
                "acl: a private cube has no read, write or share list; make it shared or leave them empty"
            )),
            Visibility::Shared => Ok(Self::Shared(grants)),
            Visibility::Public => Ok(Self::Public(grants)),
        }
    }
}

impl From<Acl> for AclLists {
    fn from(acl: Acl) -> Self {
        let (visibility, Grants { read, write, share }) = match acl {
            Acl::Private => (Visibility::Private, Grants::default()),
            Acl::Shared(grants) => (Visibility::Shared, grants),
            Acl::Public(grants) => (Visibility::Public, grants),
        };
        Self { visibility, read, write, share }
    }
}

fn sorted(mut list: Vec<Principal>) -> Result<Vec<Principal>> {
    list.sort();
    list.dedup();
    match list.len() {
        0..=MAX_LISTED => Ok(list),
        len => Err(invalid!("acl: a list names {len} principals, {MAX_LISTED} are allowed")),
    }
}

impl FromStr for Principal {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_name =
            (1..=MAX_PRINCIPAL_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        let fault =
            || invalid!("a principal is named by 1 to {MAX_PRINCIPAL_BYTES} visible ASCII characters without spaces");
        is_name.then(|| Self(text.to_owned())).ok_or_else(fault)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Principal> for String {
    fn from(principal: Principal) -> Self {
        principal.0
    }
}

impl TryFrom<String> for Principal {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(name: &str) -> Principal {
        name.parse().unwrap()
    }

    #[test]
    fn every_list_grants_what_it_says() {
        use Access::{Own, Read, Share, Write};
        let lists = AclLists {
            visibility: Visibility::Shared,
            read: vec![principal("reader")],
            write: vec![principal("writer"), principal("also"), principal("writer")],
            share: vec![principal("sharer")],
        };
        let shared = Acl::try_from(lists.clone()).unwrap();
        let public = Acl::try_from(AclLists { visibility: Visibility::Public, ..lists }).unwrap();
        for (name, shared_grants, public_grants) in [
            ("owner", vec![Read, Write, Share, Own], vec![Read, Write, Share, Own]),
            ("reader", vec![Read], vec![Read]),
            ("writer", vec![Read, Write], vec![Read, Write]),
            ("also", vec![Read, Write], vec![Read, Write]),
            ("sharer", vec![Read, Share], vec![Read, Share]),
            ("stranger", vec![], vec![Read]),
        ] {
            for access in [Read, Write, Share, Own] {
                let allows = |acl: &Acl| acl.allows(&principal("owner"), &principal(name), access);
                assert_eq!(allows(&shared), shared_grants.contains(&access), "{name} {access:?}");
                assert_eq!(allows(&public), public_grants.contains(&access), "{name} {access:?}");
                assert_eq!(allows(&Acl::Private), name == "owner", "{name} {access:?}");
            }
        }
    }

    #[test]
    fn contradicting_and_endless_lists_are_refused() {
        let private = AclLists { read: vec![principal("a")], ..AclLists::default() };
        assert!(Acl::try_from(private).is_err());
        let many = (0..257).map(|i| principal(&format!("p{i}"))).collect();
        let endless = AclLists { visibility: Visibility::Shared, read: many, ..AclLists::default() };
        assert!(Acl::try_from(endless).is_err());
        for name in ["", "a b", "a\n", "\u{e9}", &"x".repeat(129)] {
            assert!(name.parse::<Principal>().is_err(), "{name}");
        }
    }
}
