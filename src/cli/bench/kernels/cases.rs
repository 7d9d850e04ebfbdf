//! Matrix products, and what is done to rows one by one.

use mneme::Result;
use mneme::backend::{Activation, Backend, DType, Norm};

use super::bench::{Bench, Sink, Work};
use super::measure::Effort;

const EPSILON: f32 = 1e-5;

/// Formats of GGUF that weights are kept in.
const QUANTISED: [DType; 8] =
    [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];

impl<B: Backend> Bench<B> {
    /// All products of a layer, and that behind the last one.
    pub(super) fn products(&self, num_tokens: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let dimensions = self.dimensions;
        let (hidden, intermediate) = (dimensions.hidden_size, dimensions.intermediate_size);
        let [qkv, output, gate_up, down, lm_head] = self.product_names;
        let activations = self.backend.activation_dtype();
        self.product(qkv, [num_tokens, hidden, dimensions.qkv_size()], activations, effort, sink)?;
        self.product(output, [num_tokens, dimensions.q_size(), hidden], activations, effort, sink)?;
        self.product(gate_up, [num_tokens, hidden, 2 * intermediate], activations, effort, sink)?;
        self.product(down, [num_tokens, intermediate, hidden], activations, effort, sink)?;
        // Rows of a prefill that nobody samples from are left out before it.
        let num_rows = num_tokens.min(self.batch_size);
        self.product(lm_head, [num_rows, hidden, dimensions.vocab_size], DType::F32, effort, sink)
    }

    fn product(
        &self,
        name: &'static str,
        [num_tokens, inputs, outputs]: [usize; 3],
        out_dtype: DType,
        effort: &Effort,
        sink: Sink<'_>,
    ) -> Result<()> {
        let matrices = self.matrices(outputs, inputs)?;
        let x = self.activations(num_tokens, inputs)?;
        let out = self.tensor(num_tokens, outputs, out_dtype)?;
        let weight_bytes = outputs * inputs * self.weight_dtype().block_bytes();
        let work = Work {
            name,
            shape: format!("[{num_tokens}, {inputs}] x [{outputs}, {inputs}]"),
            bytes: weight_bytes + x.num_bytes() + out.num_bytes(),
            flops: 2 * num_tokens * outputs * inputs,
        };
        let launch = |turn: usize| self.backend.linear(&self.stream, &x, &matrices[turn % matrices.len()], None, &out);
        self.measure(effort, work, &launch, sink)
    }

    /// The longest product of a layer by quantised weights, in every format that a device keeps so, and rows of these.
    pub(super) fn quantised(&self, num_tokens: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let (inputs, outputs) = (self.dimensions.hidden_size, 2 * self.dimensions.intermediate_size);
        let x = self.activations(num_tokens, inputs)?;
        let out = self.activations(num_tokens, outputs)?;
        let residual = self.tensor(num_tokens, inputs, DType::F32)?;
        let ids = self.indices(&(0..num_tokens).map(|at| at * 7919 % outputs).collect::<Vec<_>>())?;
        for dtype in QUANTISED {
            let matrices = self.matrices_of(outputs, inputs, dtype)?;
            let row_bytes = inputs / dtype.block_elements() * dtype.block_bytes();
            let work = Work {
                name: "quantised linear",
                shape: format!("[{num_tokens}, {inputs}] x [{outputs}, {inputs}], {dtype}"),
                bytes: outputs * row_bytes + x.num_bytes() + out.num_bytes(),
                flops: 2 * num_tokens * outputs * inputs,
            };
            let launch =
                |turn: usize| self.backend.linear(&self.stream, &x, &matrices[turn % matrices.len()], None, &out);
            self.measure(effort, work, &launch, sink)?;
            let work = Work {
                name: "quantised embed",
                shape: format!("[{num_tokens}, {inputs}], {dtype}"),
                bytes: num_tokens * row_bytes + residual.num_bytes(),
                flops: 0,
            };
            self.measure(
                effort,
                work,
                &|_| self.backend.embed(&self.stream, &matrices[0], &ids, 1.0, &residual),
                sink,
            )?;
        }
        Ok(())
    }

    /// Embedding, norms and activations.
    pub(super) fn elementwise(&self, num_tokens: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let dimensions = self.dimensions;
        let (hidden, intermediate) = (dimensions.hidden_size, dimensions.intermediate_size);
        let (residual, x) = (self.tensor(num_tokens, hidden, DType::F32)?, self.activations(num_tokens, hidden)?);
        let delta = self.activations(num_tokens, hidden)?;
        let work = |name, columns: usize, bytes: usize| Work {
            name,
            shape: format!("[{num_tokens}, {columns}]"),
            bytes: num_tokens * columns * bytes,
            flops: 0,
        };
        let activation_bytes = self.activation_bytes();
        let weight = self.tensor(1, hidden, DType::F32)?;
        let norm = Norm { weight: &weight, epsilon: EPSILON };
        let launch = |_| self.backend.rms_norm(&self.stream, &residual, &norm, &x);
        self.measure(effort, work("rms_norm", hidden, 4 + activation_bytes), &launch, sink)?;
        let launch = |_| self.backend.add_rms_norm(&self.stream, &residual, &delta, &norm, &x);
        self.measure(effort, work("add_rms_norm", hidden, 8 + 2 * activation_bytes), &launch, sink)?;

        let gate_up = self.activations(num_tokens, 2 * intermediate)?;
        let out = self.activations(num_tokens, intermediate)?;
        for (name, activation) in
            [("gated_activation silu", Activation::Silu), ("gated_activation gelu", Activation::GeluTanh)]
        {
            let launch = |_| self.backend.gated_activation(&self.stream, &gate_up, activation, &out);
            self.measure(effort, work(name, intermediate, 3 * activation_bytes), &launch, sink)?;
        }

        let table = &self.matrices(dimensions.vocab_size, hidden)?[0];
        let ids: Vec<usize> = (0..num_tokens).map(|at| at * 7919 % dimensions.vocab_size).collect();
        let ids = self.indices(&ids)?;
        let launch = |_| self.backend.embed(&self.stream, table, &ids, 1.0, &residual);
        self.measure(effort, work("embed", hidden, 4 + self.weight_dtype().block_bytes()), &launch, sink)?;

        let last = self.indices(&(0..num_tokens).rev().collect::<Vec<_>>())?;
        let launch = |_| self.backend.gather_rows(&self.stream, &x, &last, &delta);
        self.measure(effort, work("gather_rows", hidden, 2 * activation_bytes), &launch, sink)
    }
}
