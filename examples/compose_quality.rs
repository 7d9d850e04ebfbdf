//! How far composed prompts are from computed ones: `cargo run --release --example compose_quality [MODEL [LAYER]]`.
//!
//! Three texts in random order stand in the system message of a chat, and a question about one of them follows. Every
//! method reads the answer that the model gives when the whole prompt is computed; printed are the mean KL divergence of
//! its next-token distributions from those of full prefill, and how often both have the same likeliest token. `link`
//! moves the KV that each text has alone to its new place and computes the first `k` tokens of each; `plain` takes it
//! with its old positions; `without` leaves the texts out. `blend` computes, beside the first `k` tokens, the share `r` of
//! each text that deviates most in the model's probe layer, or in `LAYER`. As in the engine, what does not fill a block is
//! computed.

use mneme::backend::cpu::{CpuBackend, Isa};
use mneme::backend::{AttentionMetadata, DType, Device, RotatedCopies, SequenceRuns, StreamKind, Tensor};
use mneme::hub::{Cache, ModelRef, catalog, resolve, stderr_progress};
use mneme::models::{Checkpoint, ForwardBatch, KvCache, Model, ProbeBatch, StepLimits, Workspace};
use mneme::text::Tokenizer;

const BLOCK_SIZE: usize = 16;
const MAX_TOKENS: usize = 1024;
const ANSWER_TOKENS: usize = 32;
const NUM_PROMPTS: usize = 24;

/// A text and a question that it answers.
const TEXTS: [(&str, &str); 8] = [
    (
        "Ana Ribeiro runs a small bakery on the harbour of Setubal. She opens at six in the morning, bakes rye bread on \
         Mondays and Thursdays, and closes the shop for the whole of August, when she visits her sister in Oslo. Her \
         most popular cake is made of oranges and almonds, after a recipe that her grandmother wrote on the back of a \
         train ticket. Since last year her nephew Tomas helps her with deliveries, which he makes with a blue cargo \
         bicycle. The bakery has only four tables, so most people take their bread home. On rainy days Ana gives away \
         what is left at five o'clock.",
        "When does Ana close her bakery, and where does she go?",
    ),
    (
        "The Kestrel 4 is a research buoy that measures waves and water temperature in the North Sea. It was built in \
         Bremen, weighs 310 kilograms and is held in place by a chain of 85 metres. Every ten minutes it sends its data \
         over a satellite link; when its battery falls below twenty percent it sends only once an hour. In the winter of \
         2021 a fishing boat cut its chain, and the buoy drifted for nine days before it was found near the coast of \
         Jutland. Its sensors are cleaned every spring by divers, because mussels grow on them.",
        "Why does the buoy need to be cleaned, and who does it?",
    ),
    (
        "To make the lentil soup of our canteen, wash half a kilogram of red lentils and cook them with two onions, four \
         carrots and a spoon of cumin in two litres of water. After twenty minutes add the juice of a lemon and a little \
         smoked paprika. The soup must not be salted before the lentils are soft. It serves eight people and keeps for \
         three days in the refrigerator. Our cook Farid serves it every Wednesday with flat bread and yoghurt, and the \
         students of the music school next door come for it in such numbers that it is usually gone by one o'clock.",
        "On which day is the soup served, and with what?",
    ),
    (
        "The city library of Graz lends musical instruments as well as books. Whoever has a library card can take a \
         violin, a guitar, an accordion or a drum home for six weeks. The idea came from Helga Moser, who had played the \
         trumpet in an orchestra before she became a librarian. Each instrument is checked by a repair shop when it comes \
         back. The accordion is asked for most often; there is a waiting list of four months for it. A deposit is not \
         necessary, but lost bows and strings have to be paid for.",
        "Which instrument of the library is asked for most often?",
    ),
    (
        "Line 7 of the tram goes from the main station to the botanical garden in twenty-six minutes. It runs every eight \
         minutes on weekdays and every fifteen minutes on Sundays. Between the stops Old Mill and River Bridge it passes \
         through a tunnel from 1911, which is so narrow that two trams cannot meet in it. Drivers have to wait for a \
         green lamp. Since March the trams of this line are painted yellow, after children of the Lindenschule had voted \
         on the colour. Dogs travel free of charge; bicycles need a ticket of their own.",
        "Why do the drivers of line 7 have to wait for a green lamp?",
    ),
    (
        "Professor Ingrid Dahl studies how honeybees find their way home. In her laboratory in Uppsala she glues tiny \
         numbers on the backs of bees and lets them go at places up to four kilometres from their hive. On cloudy days \
         most of them come back by following rivers and rows of trees. Her best known experiment used a field of mirrors \
         to change the direction of the sunlight: the bees flew off at exactly the wrong angle. She keeps thirty hives \
         on the roof of the institute and sells the honey to pay for coffee.",
        "What did the bees do in the experiment with mirrors?",
    ),
    (
        "The lighthouse of Punta Sera was switched off in 1987 and is a hotel today. It has five rooms, one above the \
         other, and no lift; the highest one has windows on all sides. Breakfast is brought up in a basket on a rope. \
         The owners, Marco and Lucia, bought it from the navy for the price of a used car, and spent eleven years on \
         repairs. In autumn many guests come to watch migrating cranes. The old lamp still works and is lit once a year, \
         on the evening of the second of November.",
        "How is breakfast brought to the rooms of the lighthouse?",
    ),
    (
        "Our football club Rot-Weiss plays in the fourth league. Its ground holds 3,200 people and lies behind the sugar \
         factory, so that it smells of molasses in autumn. The coach, Petra Lang, is a teacher of mathematics and writes \
         down every pass of her team in a green notebook. Last season they won eleven matches, all of them at home. The \
         goalkeeper, Yusuf, has been with the club for nineteen years and also mows the grass. Tickets cost six euros, \
         and whoever comes in a red hat pays half.",
        "Who pays half the price for a ticket of the football club?",
    ),
];

type Buffer = <CpuBackend as Device>::Buffer;

/// A model with its cache, without an engine.
struct Runner {
    backend: CpuBackend,
    stream: <CpuBackend as Device>::Stream,
    model: Model<CpuBackend>,
    kv: KvCache<Buffer>,
    workspace: Workspace<Buffer>,
}

impl Runner {
    fn new(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let backend = CpuBackend::new(Isa::best(), 2)?;
        let model = Model::load(&backend, checkpoint, None, MAX_TOKENS)?;
        let layout = model.kv_layout(&backend, BLOCK_SIZE, DType::BF16)?;
        let limits = StepLimits { max_tokens: MAX_TOKENS, max_logits: ANSWER_TOKENS };
        Ok(Self {
            stream: backend.create_stream(StreamKind::Compute)?,
            kv: KvCache::new(&backend, layout, 2 * MAX_TOKENS / BLOCK_SIZE)?,
            workspace: Workspace::new(&backend, model.config(), limits)?,
            backend,
            model,
        })
    }

    fn indices(&self, values: impl Iterator<Item = usize>) -> anyhow::Result<Tensor<Buffer>> {
        self.numbers(values.map(|value| value as i32))
    }

    fn numbers(&self, values: impl Iterator<Item = i32>) -> anyhow::Result<Tensor<Buffer>> {
        let values: Vec<i32> = values.collect();
        let mut host = self.backend.allocate_host(4 * values.len())?;
        for (bytes, value) in host.as_mut().chunks_exact_mut(4).zip(&values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        let buffer = self.backend.allocate(4 * values.len())?;
        self.backend.upload(&self.stream, &host, &buffer, 0..4 * values.len())?;
        Ok(Tensor::new(buffer, 0, 1, values.len(), DType::I32))
    }

    /// Computes the tokens at `positions` of a sequence in the first blocks; the logits of the last `num_logits`.
    fn forward(&self, tokens: &[u32], positions: &[usize], num_logits: usize) -> anyhow::Result<Vec<Vec<f32>>> {
        let attention = self.attention(positions)?;
        let input_ids = self.indices(positions.iter().map(|at| tokens[*at] as usize))?;
        let output_rows = self.indices(positions.len() - num_logits..positions.len())?;
        let batch = ForwardBatch { input_ids, attention, output_rows, num_logits, landings: &[] };
        self.model.forward(&self.backend, &self.stream, &batch, None, &self.kv, &self.workspace)?;
        let logits = self.workspace.logits(num_logits);
        Ok(self.download(&logits)?.chunks(self.model.config().vocab_size).map(<[f32]>::to_vec).collect())
    }

    fn attention(&self, positions: &[usize]) -> anyhow::Result<AttentionMetadata<Buffer>> {
        let num_tokens = positions.len();
        let context_len = positions.last().map_or(0, |last| last + 1);
        Ok(AttentionMetadata {
            num_seqs: 1,
            num_tokens,
            max_query_len: num_tokens,
            max_context_len: context_len,
            runs: SequenceRuns::of([(num_tokens, context_len)]),
            cu_seqlens_q: self.indices([0, num_tokens].into_iter())?,
            context_lens: self.indices(std::iter::once(context_len))?,
            block_tables: self.indices(0..MAX_TOKENS / BLOCK_SIZE)?,
            positions: self.indices(positions.iter().copied())?,
            slot_mapping: self.indices(positions.iter().copied())?,
        })
    }

    fn download(&self, numbers: &Tensor<Buffer>) -> anyhow::Result<Vec<f32>> {
        let mut host = self.backend.allocate_host(numbers.num_bytes().max(4))?;
        self.backend.download(&self.stream, numbers, &mut host, 0)?;
        let bytes = &host.as_ref()[..numbers.num_bytes()];
        Ok(bytes.chunks_exact(4).map(|at| f32::from_le_bytes([at[0], at[1], at[2], at[3]])).collect())
    }

    /// How far the KV of the tokens is from what lies at their places in the cache.
    fn probe(&self, tokens: &[u32], layer: Option<usize>) -> anyhow::Result<Vec<f32>> {
        let num_tokens = tokens.len();
        let batch = ProbeBatch {
            input_ids: self.indices(tokens.iter().map(|token| *token as usize))?,
            attention: self.attention(&(0..num_tokens).collect::<Vec<_>>())?,
            layer: layer.unwrap_or(self.model.config().probe_layer()),
            slots: self.indices(0..num_tokens)?,
            no_slots: self.numbers(tokens.iter().map(|_| -1))?,
            deviations: Tensor::new(self.backend.allocate(4 * num_tokens)?, 0, 1, num_tokens, DType::F32),
        };
        self.model.probe(&self.backend, &self.stream, &batch, None, &self.kv, &self.workspace)?;
        self.download(&batch.deviations)
    }

    /// Copies tokens between slots; keys are turned by the distance when that is wanted.
    fn copy(&self, sources: &[usize], targets: &[usize], delta: usize) -> anyhow::Result<()> {
        if sources.is_empty() {
            return Ok(());
        }
        let copies = RotatedCopies {
            source_slots: self.indices(sources.iter().copied())?,
            target_slots: self.indices(targets.iter().copied())?,
            position_deltas: self.indices(sources.iter().map(|_| delta))?,
        };
        Ok(self.model.rotate_gather(&self.backend, &self.stream, &self.kv, &copies)?)
    }
}

/// A prompt of texts: its tokens, and where the texts stand.
struct Prompt {
    tokens: Vec<u32>,
    head: Vec<u32>,
    texts: Vec<(usize, Vec<u32>)>,
}

impl Prompt {
    fn new(tokenizer: &Tokenizer, texts: &[&str], question: &str) -> anyhow::Result<Self> {
        let head = tokenizer.encode("<|im_start|>system\n", false)?;
        let mut tokens = head.clone();
        let mut places = vec![];
        for (number, text) in texts.iter().enumerate() {
            if number > 0 {
                tokens.extend(tokenizer.encode("\n\n", false)?);
            }
            let text = tokenizer.encode(text, false)?;
            places.push((tokens.len(), text.clone()));
            tokens.extend(text);
        }
        let rest = format!("<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        tokens.extend(tokenizer.encode(&rest, false)?);
        Ok(Self { tokens, head, texts: places })
    }

    /// Fills the cache with the texts as they are alone. The places that this leaves to compute.
    fn link(&self, runner: &Runner, num_recomputed: usize, is_rotated: bool) -> anyhow::Result<Vec<usize>> {
        let mut computed: Vec<usize> = (0..self.tokens.len()).collect();
        let mut moved = vec![];
        for (start, text) in &self.texts {
            let source = [&self.head[..], text].concat();
            let stored: Vec<usize> =
                (self.head.len() + num_recomputed..source.len() / BLOCK_SIZE * BLOCK_SIZE).collect();
            runner.forward(&source, &(0..source.len()).collect::<Vec<_>>(), 0)?;
            let distance = start - self.head.len();
            let targets: Vec<usize> = stored.iter().map(|at| at + distance).collect();
            let aside: Vec<usize> = targets.iter().map(|at| at + MAX_TOKENS).collect();
            runner.copy(&stored, &aside, if is_rotated { distance } else { 0 })?;
            computed.retain(|at| !targets.contains(at));
            moved.extend(targets);
        }
        runner.copy(&moved.iter().map(|at| at + MAX_TOKENS).collect::<Vec<_>>(), &moved, 0)?;
        Ok(computed)
    }
}

impl Prompt {
    /// The same, and the share of each text that deviates most is left to compute.
    fn blend(&self, runner: &Runner, blend: Blend) -> anyhow::Result<Vec<usize>> {
        let mut computed = self.link(runner, blend.num_recomputed, true)?;
        let (start, text) = self.texts.last().ok_or_else(|| anyhow::anyhow!("a prompt without texts"))?;
        let deviations = runner.probe(&self.tokens[..start + text.len()], blend.layer)?;
        for (start, text) in &self.texts {
            let places = *start..start + text.len();
            let mut moved: Vec<usize> = places.filter(|at| computed.binary_search(at).is_err()).collect();
            moved.sort_by(|a, b| deviations[*b].total_cmp(&deviations[*a]));
            moved.truncate((blend.share * text.len() as f64).round() as usize);
            computed.extend(moved);
            computed.sort_unstable();
        }
        Ok(computed)
    }
}

fn best(logits: &[f32]) -> u32 {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(id, _)| id as u32)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - most) - sum.ln()).collect()
}

/// What one method has added up.
#[derive(Default)]
struct Score {
    kl: f64,
    num_agreeing: usize,
    num_first_agreeing: usize,
    num_positions: usize,
    num_computed: usize,
    num_tokens: usize,
}

impl Score {
    fn add(&mut self, wanted: &[Vec<f32>], found: &[Vec<f32>]) {
        for (at, (wanted, found)) in wanted.iter().zip(found).enumerate() {
            let (p, q) = (log_softmax(wanted), log_softmax(found));
            self.kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            let agrees = best(wanted) == best(found);
            self.num_agreeing += usize::from(agrees);
            self.num_first_agreeing += usize::from(agrees && at == 0);
            self.num_positions += 1;
        }
    }
}

/// A way to come to the KV of a prompt.
#[derive(Clone, Copy)]
enum Method {
    Text,
    Link(usize),
    Plain(usize),
    Blend(Blend),
    Without,
}

/// How much of each text is computed again, and in which layer its tokens are compared.
#[derive(Clone, Copy)]
struct Blend {
    num_recomputed: usize,
    share: f64,
    layer: Option<usize>,
}

fn main() -> anyhow::Result<()> {
    let name = std::env::args().nth(1).unwrap_or_else(|| catalog::DEFAULT_MODEL.into());
    let path = resolve(&ModelRef::parse(&name)?, &Cache::from_env()?, stderr_progress().as_mut())?.path;
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = match checkpoint.gguf() {
        Some(gguf) => Tokenizer::from_gguf(gguf.vocabulary()?)?,
        None => Tokenizer::from_json_file(&path.join("tokenizer.json"))?,
    };
    let runner = Runner::new(&checkpoint)?;
    let layer = std::env::args().nth(2).map(|layer| layer.parse()).transpose()?;
    let blend = |num_recomputed, share| Method::Blend(Blend { num_recomputed, share, layer });
    let methods = [
        ("text", Method::Text),
        ("link, k = 0", Method::Link(0)),
        ("link, k = 4", Method::Link(4)),
        ("link, k = 8", Method::Link(8)),
        ("link, k = 16", Method::Link(16)),
        ("link, k = 32", Method::Link(32)),
        ("blend, k = 0, r = 10 %", blend(0, 0.10)),
        ("blend, k = 0, r = 15 %", blend(0, 0.15)),
        ("blend, k = 0, r = 30 %", blend(0, 0.30)),
        ("blend, k = 16, r = 10 %", blend(16, 0.10)),
        ("blend, k = 16, r = 15 %", blend(16, 0.15)),
        ("blend, k = 16, r = 30 %", blend(16, 0.30)),
        ("plain, k = 0", Method::Plain(0)),
        ("plain, k = 16", Method::Plain(16)),
        ("without", Method::Without),
    ];
    let mut scores: Vec<Score> = methods.iter().map(|_| Score::default()).collect();
    let mut state = 1u64;
    for _ in 0..NUM_PROMPTS {
        let chosen = choose_three(&mut state);
        let question = TEXTS[chosen[state as usize % 3]].1;
        compare(&runner, &tokenizer, &chosen.map(|at| TEXTS[at].0), question, &methods, &mut scores)?;
    }
    report(&name, &methods, &scores)
}

/// Three different texts in random order: SplitMix64.
fn choose_three(state: &mut u64) -> [usize; 3] {
    let mut order: Vec<usize> = (0..TEXTS.len()).collect();
    [(); 3].map(|()| {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap_remove(((z ^ (z >> 31)) % order.len() as u64) as usize)
    })
}

fn compare(
    runner: &Runner,
    tokenizer: &Tokenizer,
    texts: &[&str],
    question: &str,
    methods: &[(&str, Method)],
    scores: &mut [Score],
) -> anyhow::Result<()> {
    let prompt = Prompt::new(tokenizer, texts, question)?;
    let mut answer = vec![];
    let mut all = prompt.tokens.clone();
    let mut logits = runner.forward(&all, &(0..all.len()).collect::<Vec<_>>(), 1)?;
    while answer.len() < ANSWER_TOKENS - 1 {
        let next = best(&logits[0]);
        answer.push(next);
        all.push(next);
        logits = runner.forward(&all, &[all.len() - 1], 1)?;
    }
    let mut wanted = vec![];
    for ((_, method), score) in methods.iter().zip(scores) {
        let without = Prompt::new(tokenizer, &[], question)?;
        let (prompt, mut computed) = match *method {
            Method::Text => (&prompt, (0..prompt.tokens.len()).collect()),
            Method::Link(num_recomputed) => (&prompt, prompt.link(runner, num_recomputed, true)?),
            Method::Blend(blend) => (&prompt, prompt.blend(runner, blend)?),
            Method::Plain(num_recomputed) => (&prompt, prompt.link(runner, num_recomputed, false)?),
            Method::Without => (&without, (0..without.tokens.len()).collect()),
        };
        score.num_computed += computed.len();
        score.num_tokens += prompt.tokens.len();
        let tokens = [&prompt.tokens[..], &answer].concat();
        computed.extend(prompt.tokens.len()..tokens.len());
        let found = runner.forward(&tokens, &computed, ANSWER_TOKENS)?;
        if matches!(method, Method::Text) {
            wanted.clone_from(&found);
        }
        score.add(&wanted, &found);
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the table is what this program is for")]
fn report(name: &str, methods: &[(&str, Method)], scores: &[Score]) -> anyhow::Result<()> {
    let num_tokens = scores[0].num_tokens / NUM_PROMPTS;
    println!("{name}: {NUM_PROMPTS} prompts of {num_tokens} tokens, {ANSWER_TOKENS} positions each");
    println!("| method | computed | KL | same likeliest token | same first token |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    for ((method, _), score) in methods.iter().zip(scores) {
        let percent = |num: usize, of: usize| 100.0 * num as f64 / of as f64;
        println!(
            "| {method} | {:.0} % | {:.4} | {:.1} % | {:.1} % |",
            percent(score.num_computed, score.num_tokens),
            score.kl / score.num_positions as f64,
            percent(score.num_agreeing, score.num_positions),
            percent(score.num_first_agreeing, NUM_PROMPTS),
        );
    }
    Ok(())
}
