"""Architectures that do not run: the mechanism that is missing, and the nearest family that runs.

The names are those of ``model_type`` in transformers. A type that becomes a family leaves this
table.
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
    ("a norm after its experts", "deepseek_v3"): "axk1",
    ("latent attention whose queries are scaled by their position", "deepseek_v3"): """
        mistral4 mistral_large4
    """,
    ("two attentions a layer, and experts without weights", "deepseek_v3"): "longcat_flash",
    ("sparse attention by an index", "deepseek_v3"): """
        deepseek_v32 deepseek_v4 glm_moe_dsa glm5_next axk2 hy_v4 hy_v4_vl dots3_note
        dots3_note_text
    """,
    ("sparse attention by an index", "minimax_m2"): "minimax_m3_vl minimax_m3_vl_text",
    ("differential attention", "llama"): "diffllama",
    ("a mask that depends on values", "llama"): "doge",
    ("hashed attention", "gpt_neox"): "reformer",
    # Nothing new, but nobody has written the file yet.
    ("a family file of its own", "gpt2"): "openai-gpt gpt-sw3",
    ("a family file of its own", "deepseek_v3"): "sarvam_mla",
    ("a family file of its own", "qwen3_moe"): "qwen3_vl_moe",
    ("sinusoidal positions", "opt"): "ctrl xlm xglm flaubert",
    ("relative positions with learned biases", "opt"): "cpmant xlnet",
    ("hidden states on the unit sphere", "llama"): "dory",
    ("residuals that are scaled by depth", "qwen3_moe"): "beam",
    ("a dense layer and a norm in its head", "gpt_neox"): "modernbert-decoder",
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
    ("experts beside attention", "cohere2"): "cohere2_moe",
    ("values of another size than keys", "glm4_moe"): "mimo_v2_flash",
    ("a softplus gate of each attention head", "afmoe"): "laguna",
    ("experts for images of their own", "ernie4_5_moe"): "ernie4_5_vl_moe",
    ("experts or a router of another kind", "qwen3_moe"): "aria aria_text flint kolibri1",
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
        xlm-roberta-xl xmod yoso esmc jina_embeddings_v3 neomme ultrabert ultravbert
    """,
    ("a factor of the logits that models for images drop", "cohere2"): "aya_vision cohere2_vision",
    ("images or sound beside the text", "kimi_k2"): "kimi_k25",
    ("cross-attention to images", "llama"): "mllama idefics",
    ("images or sound beside the text", "llama"): """
        apertus1p5 apertus1p5_text audioflamingo3 blip blip-2 canary chameleon cohere_asr
        cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl deepseek_vl_hybrid dia emu3 evolla
        exaone4_5 fast_vlm fun_asr_nano git glm46v glm_ocr glmasr glmga got_ocr2 granite4_vision
        granite_docling granite_speech granite_speech_plus hunyuan_vl hyperclovax_vision_v2 idefics2
        instructblip instructblipvideo janus kosmos-2 kosmos-2.5 kyutai_speech_to_text
        lighton_ocr llava_next_video minicpm_ocr minicpmv4_6 minicpmv4_7 molmo2 moonshine
        moonshine_streaming moshi moss_transcribe_diarize muse_glimmer muse_spark musicflamingo
        nemo_speechlm omniasr ovis2 paddleocr_vl paligemma perception_lm phi4_multimodal pi0
        pop2piano pp_chart2table pp_formulanet qianfan_ocr qwen2_5_omni qwen2_5_omni_thinker
        qwen2_audio qwen3_asr qwen3_omni_moe qwen3_omni_moe_thinker shieldgemma2
        speech-encoder-decoder speech_to_text speecht5 step3p7 unlimited_ocr fuyu vibevoice
        vibevoice_asr video_llama_3 video_llava vipllava voxtral voxtral_realtime
    """,
    ("code that only its own repository has", "llama"): """
        aquila baichuan bailing_moe chatglm deepseek internlm internlm2 internvl_chat minicpm orion
        qwen telechat xverse
    """,
}

# By model type: the mechanism, and the nearest family.
REFUSED = {kind: reason for reason, kinds in _GROUPS.items() for kind in kinds.split()}
