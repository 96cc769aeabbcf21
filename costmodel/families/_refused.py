"""Architectures that do not run: the mechanism that is missing, and the nearest family that runs.

The names are those of ``model_type`` in transformers. A type that becomes a family leaves this
table; until then, its family wins.
"""

from __future__ import annotations

# By mechanism and nearest family: the model types.
_GROUPS = {
    # Layers that keep a state, instead of the keys and values of each token.
    ("state-space layers", "llama"): """
        mamba mamba2 falcon_mamba falcon_h1 bamba nemotron_h nemotron_h_omni zamba zamba2
    """,
    ("state-space layers and experts", "mixtral"): "jamba",
    ("state-space layers", "granite"): "granitemoehybrid",
    ("gated delta-rule layers", "qwen3"): "qwen3_5 qwen3_5_text lara_mini",
    ("gated delta-rule layers", "qwen3_moe"): """
        qwen3_next qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text kimi_linear bailing_hybrid
    """,
    ("gated delta-rule layers", "olmo3"): "olmo_hybrid",
    ("linear (lightning) attention", "minimax_m2"): "minimax",
    ("recurrent layers", "llama"): "rwkv xlstm",
    ("recurrent layers", "gemma2"): "recurrent_gemma",
    ("short convolutions", "llama"): "lfm2 lfm3 lfm2_vl lfm3_vl",
    ("short convolutions", "mixtral"): """
        lfm2_moe zaya inkling_text inkling_mm_model inkling2 inkling2_text inkling2_loop
        inkling2_loop_text
    """,
    ("stacks of layers that repeat", "llama"): "hrm_text",
    # Attention of other kinds.
    ("latent attention", "qwen3_moe"): """
        deepseek_v2 deepseek_v3 deepseek_ocr2 unlimited_ocr kimi_k2 kimi_k25 glm4_moe_lite axk1
        sarvam_mla mistral4 mistral_large4
    """,
    ("latent attention", "llama"): "minicpm3 youtu",
    ("two attentions a layer, and experts without weights", "qwen3_moe"): "longcat_flash",
    ("sparse attention by an index", "glm4_moe"): """
        deepseek_v32 deepseek_v4 glm_moe_dsa axk2 hy_v4 hy_v4_vl dots3_note dots3_note_text
    """,
    ("sparse attention by an index", "minimax_m2"): "minimax_m3_vl minimax_m3_vl_text",
    ("differential attention", "llama"): "diffllama",
    ("a mask that depends on values", "llama"): "doge",
    ("hashed attention", "gpt_neox"): "reformer",
    ("attention with linear biases (ALiBi)", "gpt_neox"): "bloom mpt",
    ("learned positions in the layout of GPT-2", "opt"): """
        gpt2 gpt-sw3 openai-gpt gpt_bigcode gpt_neo biogpt
    """,
    ("sinusoidal positions", "opt"): "ctrl xlm xglm flaubert kosmos-2 kosmos-2.5",
    ("relative positions with learned biases", "opt"): "cpmant xlnet",
    ("queries, keys and values that are stored in blocks", "gptj"): "codegen",
    ("norms of heads with biases", "gpt_neox"): "persimmon fuyu",
    ("hidden states on the unit sphere", "llama"): "dory",
    ("queries that are scaled by their position", "qwen3_moe"): "beam",
    ("a norm of the embedding", "gpt_neox"): "modernbert-decoder",
    ("images as positions of three dimensions", "cohere2"): "cohere_compass cohere_compass_text",
    # Feed-forward networks of other kinds.
    ("ternary weights", "llama"): "bitnet",
    ("per-layer embeddings", "gemma3_text"): """
        gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text diffusion_gemma
    """,
    ("attention to the cache of another model", "gemma3_text"): """
        gemma4_assistant gemma4_unified_assistant
    """,
    ("bytes in patches instead of tokens", "llama"): "blt",
    ("experts of attention", "mixtral"): "jetmoe",
    ("experts or a router of a kind that is not read", "mixtral"): """
        dbrx gpt_oss phimoe granitemoe granitemoeshared granitemoe_swa aria aria_text flex_olmo
        hunyuan_v1_moe cohere2_moe kolibri1 llama4 llama4_text
    """,
    ("experts or a router of a kind that is not read", "glm4_moe"): """
        dots1 afmoe exaone_moe solar_open laguna mimo_v2_flash hy_v3 sarvam_moe ernie4_5_moe
        ernie4_5_vl_moe flint mellum
    """,
    ("experts of all layers in one tensor", "qwen3_moe"): "qwen3_vl_moe",
    ("a norm of the embedding without weights", "llama"): "nanochat",
    # Models that are no decoders of text alone.
    ("an encoder beside the decoder", "llama"): """
        bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100
        marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5
        t5gemma t5gemma2 umt5 seamless_m4t seamless_m4t_v2 whisper musicgen musicgen_melody trocr
        vision-encoder-decoder udop pix2struct florence2
    """,
    ("attention to later tokens, as in an encoder", "llama"): """
        albert bert bert-generation big_bird camembert convbert data2vec-text deberta deberta-v2
        distilbert electra ernie esm eurobert fnet funnel gte ibert layoutlm longformer luke
        megatron-bert mobilebert modernbert modernvbert mpnet mra nomic_bert nystromformer perceiver
        rembert roberta roberta-prelayernorm roc_bert roformer squeezebert tapas xlm-roberta
        xlm-roberta-xl xmod yoso
    """,
    ("a factor of the logits that models for images drop", "cohere2"): "aya_vision cohere2_vision",
    ("cross-attention to images", "llama"): "mllama idefics",
    ("images or sound beside the text", "llama"): """
        apertus1p5 apertus1p5_text emu3 git got_ocr2 moshi moss_transcribe_diarize
        phi4_multimodal paligemma
    """,
}

# By model type: the mechanism, and the nearest family.
REFUSED = {kind: reason for reason, kinds in _GROUPS.items() for kind in kinds.split()}
