"""Bytes of the temporaries of one layer, which torch allocates outside of the arenas."""

from __future__ import annotations

from costmodel.model.attention_spec import AttentionSpec, LatentSpec
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_layout import TensorLayout
from costmodel.pricing.problem import Problem
from profiles.packing import DECODED_AT_ONCE_BYTES, UNPACKED_AT_ONCE_BYTES
from profiles.product_parts import wide_bytes
from profiles.units import MIB

# Tokens are chosen from float32 logits, whatever the compute dtype.
LOGIT_BYTES = 4
# Prompts are scored in tiles of the logits: so many tokens by so many words of the vocabulary.
# More columns are no faster, and a library copies as many rows of the matrix.
SCORED_ROWS = 1024
SCORED_COLUMNS = 2048
# Prefill attends in tiles where a window hides keys or the softmax is not the plain one: so many
# queries, and with another softmax so many keys, no fewer than the queries.
QUERIES_AT_ONCE = 128
KEYS_AT_ONCE = 512
# Latent attention makes keys and values of so many heads at once, or multiplies by their matrices.
LATENT_HEADS_AT_ONCE = 16
# Temporaries of many sizes leave gaps in the heap, and libraries copy operands. Measured at hidden
# size 3072: 0.16 to 0.28 of the workspace, and 4 to 8 MB. A tokenizer, our own modules and the
# threads of the channels take some 10 MB more than an empty process; packing weights or making
# random ones takes up to 20 MB.
ALLOCATOR_SHARE = 0.25
LIBRARY_BYTES = 32 * MIB
# cuBLAS keeps 32 MiB for each stream that multiplies (on Hopper; 8 before).
CUDA_LIBRARY_BYTES = 40 * MIB
# A router's copies of a token's float32 scores. Bytes of each choice while those of all tokens are
# sorted: two copies of its number and weight, and three integers.
ROUTER_SCORES = 3
CHOICE_BYTES = 48


def workspace_bytes(problem: Problem, phase: str) -> int:
    """Return the most bytes that the temporaries of one layer take at once.

    The largest of three counts: the first half of a decoder layer (norm, projections, attention),
    the second half (norm, MLP or experts), and one chunk of the head. ``executor.model.layers``
    and ``executor.model.experts`` list the temporaries.
    """
    if problem.lanes is not None:
        rows = {"prefill": rows_at_once(problem), "decode": problem.gpu_batch_size}
        return max(_workspace_bytes(problem, name, count) for name, count in rows.items())
    if phase == "decode":
        return _workspace_bytes(problem, phase, problem.gpu_batch_size)
    prompt_len = problem.workload.prompt_len
    return min(
        _workspace_bytes(problem, phase, size * prompt_len) for size in problem.prefill_batch_sizes
    )


def rows_at_once(problem: Problem) -> int:
    """Return the most rows of lanes that pass through a layer at once: those of a chunk, or the
    lanes of a batch that decode."""
    assert problem.lanes is not None
    rows = max(problem.gpu_batch_size, problem.lanes.chunk_rows)
    return min(rows, problem.lanes.pass_rows)


def _cut_prompt_bytes(problem: Problem) -> int:
    """Count what a layer needs of the one prompt of lanes that is cut: its keys and values, as
    attention takes them and as they are packed; of latent attention those of some heads, too."""
    if problem.lanes is None or problem.lanes.pass_rows <= problem.lanes.chunk_rows:
        return 0
    counts = []
    for kind in problem.layer_kinds:
        attention, count = kind.spec.attention, kind.cache.full_token_bytes
        if problem.packs_cache:
            count += kind.cache.token_bytes
        if attention.latent is not None:
            latent, heads = attention.latent, min(attention.num_heads, LATENT_HEADS_AT_ONCE)
            made = latent.nope_dim + latent.value_dim + latent.key_dim
            count += heads * made * problem.model.dtype_bytes
        counts.append(count)
    return max(counts) * problem.workload.prompt_len


def _workspace_bytes(problem: Problem, phase: str, tokens: int) -> int:
    model = problem.model
    norm = model.hidden_size * (LOGIT_BYTES * 2 // model.dtype_bytes + 1)
    halves = [_half_elements(k.spec, model, phase) for k in problem.layer_kinds]
    if problem.lanes is not None:
        # The attended values of one prompt, beside those of all rows.
        more = [kind.spec.attention.output_size for kind in problem.layer_kinds]
        halves = [half + size for half, size in zip(halves, more, strict=True)]
    layer_bytes = tokens * max(norm, *halves) * model.dtype_bytes
    layer_bytes += _cut_prompt_bytes(problem) if phase == "prefill" else 0
    tile_bytes = _tile_bytes if phase == "prefill" else _latent_matrix_bytes
    layer_bytes += max(tile_bytes(problem, kind.spec.attention) for kind in problem.layer_kinds)
    routed, held = _routed_rows(problem, phase, tokens), _held_rows(problem, phase, tokens)
    layer_bytes = max(layer_bytes, expert_bytes(problem, routed, held))
    head_bytes, head_rows = _head_bytes(problem), _head_rows(problem)
    if phase == "prefill" and problem.workload.scores_prompts and model.has_head:
        # The hidden states of one tile, and their norm.
        hidden_bytes = SCORED_ROWS * model.hidden_size * (2 * model.dtype_bytes + LOGIT_BYTES)
        head_bytes = max(head_bytes, hidden_bytes)
        tokens = max(tokens, SCORED_ROWS)
    needed = max(layer_bytes, head_bytes) + _unpacked_cache_bytes(problem, phase)
    beside = CUDA_LIBRARY_BYTES
    if not problem.hardware.uses_cuda:
        beside = LIBRARY_BYTES + _wide_bytes(problem, max(tokens, head_rows))
    if problem.keeps_encodings:
        beside += DECODED_AT_ONCE_BYTES
        needed += _sorted_bytes(problem, max(tokens, head_rows))
    return round(needed * (1 + ALLOCATOR_SHARE)) + beside


def _head_bytes(problem: Problem) -> int:
    """Count the bytes of the batches in a chunk of the head, which makes their logits in the
    model's dtype, then copies them to all others."""
    if (matrix := problem.sizes.head_matrix) is None:
        return 0
    model, batch, rows = problem.model, problem.gpu_batch_size, _head_rows(problem)
    count = rows * matrix.num_rows * model.dtype_bytes
    if rows > batch:
        # Their inputs, before they are put together.
        count += rows * problem.hidden_token_bytes
    if problem.workload.logprobs is not None:
        # Processors change the logits that the chosen tokens are scored by.
        count += batch * model.vocab_size * LOGIT_BYTES
    return count


def _head_rows(problem: Problem) -> int:
    """Return the rows that pass through a chunk of the head at once."""
    return problem.gpu_batch_size * problem.head_batches_at_once[0]


def _routed_rows(problem: Problem, phase: str, tokens: int) -> int:
    """Return the rows that pass through experts at once."""
    if problem.lanes is not None:
        # Those of the lanes are picked where others have ended.
        lanes = problem.gpu_batch_size * problem.num_batches[1]
        return min(max(problem.lanes.chunk_rows, lanes), problem.lanes.pass_rows)
    return tokens if phase == "prefill" else tokens * problem.batches_at_once[0]


def _held_rows(problem: Problem, phase: str, tokens: int) -> int:
    """Return the rows whose inputs and outputs are held while experts are computed."""
    if phase == "prefill" and problem.walks_experts:
        # Those of all prompts, because each chunk of experts is loaded once.
        batches = problem.batches_at_once[0] * problem.gpu_batch_size
        return batches * problem.workload.prompt_len
    return _routed_rows(problem, phase, tokens)


def scored_tile_bytes(model: ModelSpec) -> int:
    """Return the bytes of one tile of the scored logits, in float32 and in the model's dtype.

    They are kept: a heap that gets them back for every tile has gaps of several of them in the end.
    """
    narrow = 0 if model.dtype_bytes == LOGIT_BYTES else model.dtype_bytes
    return SCORED_ROWS * min(model.vocab_size, SCORED_COLUMNS) * (LOGIT_BYTES + narrow)


def _half_elements(layer: LayerSpec, model: ModelSpec, phase: str) -> int:
    """Count the elements of each token in the larger half of a layer, without experts."""
    attention, mlp, hidden_size = layer.attention, layer.mlp, model.hidden_size
    attended = hidden_size + 2 * attention.qkv_size
    if attention.latent is None:
        attended += 2 * attention.query_size
    else:
        attended += _latent_elements(attention, attention.latent, phase)
    if attention.qk_norm != "none":
        # Two float32 copies of the queries, and the result.
        normed = attention.query_size * (1 + 2 * LOGIT_BYTES // model.dtype_bytes)
        attended = max(attended, attention.qkv_size + normed)
    if mlp is None:
        return attended
    fed = 2 * hidden_size + mlp.inner_rows + mlp.size
    # Parallel halves hold the attention's output while the MLP computes.
    return max(attended, fed + attention.output_size + hidden_size if layer.is_parallel else fed)


def _latent_elements(attention: AttentionSpec, latent: LatentSpec, phase: str) -> int:
    """Count the elements of each token that ``executor.model.latent_attention`` lists."""
    heads, at_once = attention.num_heads, min(attention.num_heads, LATENT_HEADS_AT_ONCE)
    kept = heads * latent.key_dim + attention.output_size
    if phase == "prefill":
        # Keys and values as they are made, then apart and padded, and the result.
        made, size = latent.nope_dim + latent.value_dim, max(latent.key_dim, latent.value_dim)
        return kept + at_once * (made + 4 * size)
    # The operand of some heads and its product.
    tile = at_once * (latent.rank + max(latent.nope_dim, latent.value_dim))
    return kept + attention.query_size + attention.cached_size + attention.attended_size + tile


def _latent_matrix_bytes(problem: Problem, attention: AttentionSpec) -> int:
    """Count the bytes of the matrices of some heads of latent attention, with key rows that are
    transposed."""
    if attention.latent is None:
        return 0
    # Those of a cut are put together of two parts.
    rows = 3 * attention.latent.nope_dim + 2 * attention.latent.value_dim
    heads = min(attention.num_heads, LATENT_HEADS_AT_ONCE)
    return heads * rows * attention.latent.rank * problem.model.dtype_bytes


def expert_bytes(problem: Problem, num_tokens: int, num_held: int) -> int:
    """Count the bytes of a mixture's temporaries, which ``executor.model.experts`` lists.

    ``num_tokens`` pass through it at once. The inputs and outputs of ``num_held`` are held.
    """
    mixtures = [kind.spec.experts for kind in problem.layer_kinds if kind.spec.experts]
    counts = (_mixture_bytes(problem, experts, num_tokens, num_held) for experts in mixtures)
    return max(counts, default=0)


def _mixture_bytes(problem: Problem, experts: ExpertsSpec, num_tokens: int, num_held: int) -> int:
    hidden, shared, expert = problem.model.hidden_size, experts.shared, experts.expert
    # Rows, sorted by expert, pass through the experts in parts.
    at_once = experts.rows_at_once(num_tokens)
    routed = at_once * (hidden + expert.inner_rows)
    beside = num_tokens * (hidden + shared.inner_rows + shared.size) if shared else 0
    # All tokens, their normalised copy, and the output.
    elements = 3 * num_held * hidden + max(routed, beside)
    scores = num_tokens * ROUTER_SCORES * experts.num_experts * LOGIT_BYTES
    chosen = num_held * experts.experts_per_token * CHOICE_BYTES
    return elements * problem.model.dtype_bytes + max(scores, chosen)


def _tile_bytes(problem: Problem, attention: AttentionSpec) -> int:
    """Count the bytes of one tile of prefill's attention beside the queries, keys and values."""
    if problem.lanes is not None:
        # The CPU's kernel keeps its tiles in a core's cache.
        return 0
    prompt_len, size = problem.workload.prompt_len, problem.model.dtype_bytes
    queries, window = min(QUERIES_AT_ONCE, prompt_len), attention.window
    if attention.has_plain_softmax:
        if window is None or window >= prompt_len:
            return 0
        # The mask, which torch makes numbers of.
        return queries * min(prompt_len, window + queries) * (2 + 2 * size)
    scores = attention.num_heads * queries * min(KEYS_AT_ONCE, prompt_len)
    # The scores and their product or shares; the queries, the sums, and what is added to them.
    sums = attention.query_size * queries
    return scores * (LOGIT_BYTES + size) + sums * (2 * LOGIT_BYTES + 2 * size)


def _wide_bytes(problem: Problem, num_tokens: int) -> int:
    """Count the bytes of operands that products convert to float32: of 16 bits, as most CPUs must,
    and encoded ones."""
    if problem.model.dtype == "float32" and not problem.keeps_encodings:
        return 0
    in_features = max(tensor.shape[1] for tensor in _staged_matrices(problem))
    return wide_bytes(num_tokens, in_features, num_threads=problem.hardware.cpu.num_cores)


def _sorted_bytes(problem: Problem, num_tokens: int) -> int:
    """Count the bytes of a product's copy for a matrix whose inputs are sorted: a CPU sorts those
    of the tokens, a GPU unpacks the matrix twice."""
    matrices = [tensor for tensor in _staged_matrices(problem) if tensor.is_sorted]
    elements = [
        t.num_elements if problem.hardware.uses_cuda else num_tokens * t.shape[1] for t in matrices
    ]
    return max(elements, default=0) * problem.model.dtype_bytes


def _staged_matrices(problem: Problem) -> list[TensorLayout]:
    layers = [layer for layer in problem.sizes.distinct_layers if layer.kind != "embed"]
    tensors = [t for layer in layers for c in layer.components for t in c.tensors]
    return [tensor for tensor in tensors if len(tensor.shape) == 2]


def _unpacked_cache_bytes(problem: Problem, phase: str) -> int:
    """Count the bytes of a batch's cache, or of its scores, that a GPU makes at once.

    A GPU may have no Triton kernel that reads the packed cache. The CPU's kernels always read it.
    """
    kinds = problem.layer_kinds
    is_plain = not problem.packs_cache and problem.attention_sparsity == 1
    is_plain = is_plain and all(
        kind.spec.attention.has_plain_softmax and kind.spec.attention.latent is None
        for kind in kinds
    )
    if is_plain or phase == "prefill" or not problem.hardware.uses_cuda:
        return 0
    # One row is never divided, whatever its size.
    context_len = problem.workload.context_len
    rows = (
        kind.cache.num_slots(context_len)
        * (kind.spec.attention.head_dim + 3 * kind.spec.attention.group_size)
        for kind in kinds
    )
    return max(UNPACKED_AT_ONCE_BYTES, 2 * max(rows) * LOGIT_BYTES)
