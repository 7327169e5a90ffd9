"""Every patch that stands on code of transformers or PEFT; docs/patches.md has all.

``python -m peft_dist.patches.fingerprints`` prints the installed fingerprints.

When a library's new version changes code that a patch stands on, ``tests/patches/test_registry.py`` fails. Read
the change, adapt the patch if it must be, run the tests, then add the printed fingerprint under that version.
"""

from __future__ import annotations

from peft_dist.patches.registry import Patch

TRANSFORMERS = ">=5.17,<5.25"
PEFT = ">=0.21,<0.22"

ATTENTION = Patch(
    target="transformers.modeling_utils:AttentionInterface",
    replacement="peft_dist.patches.attention:paged_attention_forward",
    kind="register",
    file="patches/attention.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Keys and values lie in blocks, and one call serves sequences of any length.",
    relies_on=(
        "transformers.utils.generic:GeneralInterface",
        "transformers.modeling_utils:AttentionInterface",
        "transformers.masking_utils:_preprocess_mask_arguments",
    ),
    fingerprints={"5.17.0": "5f635f10d61cb5e8", "5.23.0": "8662f9b56f970274", "5.24.0": "74eed5dfd98399b1"},
)
ATTENTION_NAME = Patch(
    target="transformers.configuration_utils:PreTrainedConfig._attn_implementation",
    replacement="peft_dist.patches.selective_call:use_paged_attention",
    kind="instance attribute",
    file="patches/selective_call.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Attention modules read it at each call; it names paged attention only while a pass of generate runs.",
    relies_on=("transformers.configuration_utils:PreTrainedConfig._attn_implementation",),
    fingerprints={"5.17.0": "be7be45af1d52295", "5.23.0": "be7be45af1d52295", "5.24.0": "be7be45af1d52295"},
)
CACHE = Patch(
    target="transformers.cache_utils:DynamicCache",
    replacement="peft_dist.patches.paged_cache:PagedCache",
    kind="class swap",
    file="patches/paged_cache.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="generate keeps its KV in blocks, which beams share until they write.",
    relies_on=(
        "transformers.cache_utils:Cache",
        "transformers.cache_utils:DynamicCache",
        "transformers.cache_utils:DynamicLayer",
        "transformers.cache_utils:DynamicSlidingWindowLayer.update",
    ),
    fingerprints={"5.17.0": "464177c50b41f92d", "5.23.0": "a4aafe236701c2eb", "5.24.0": "062136937995fc2b"},
)
BASE_FORWARD = Patch(
    target="transformers.modeling_utils:PreTrainedModel.forward",
    replacement="peft_dist.patches.selective_call:intercept",
    kind="instance attribute",
    file="patches/selective_call.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Each pass that generate makes needs its own rows and block tables; set only while a call runs.",
    relies_on=(
        "transformers.generation.utils:GenerationMixin._prefill",
        "transformers.generation.utils:GenerationMixin._sample",
        "transformers.generation.utils:GenerationMixin._beam_search",
        "transformers.generation.utils:GenerationMixin._expand_inputs_for_generation",
        "transformers.generation.utils:GenerationMixin._prepare_cache_for_generation",
    ),
    fingerprints={"5.17.0": "927d71ad08f78ed2", "5.23.0": "62d4651c2de6d184", "5.24.0": "10a875f6526ddad8"},
)
LINEAR = Patch(
    target="peft.tuners.lora.layer:Linear",
    replacement="peft_dist.patches.lora_layers:SelectiveLinear",
    kind="class swap",
    file="patches/lora_layers.py",
    library="peft",
    versions=PEFT,
    reason="Rows of many adapters in one call, without a loop over adapters.",
    relies_on=(
        "peft.tuners.lora.layer:LoraLayer.__init__",
        "peft.tuners.lora.layer:LoraLayer._check_forward_args",
        "peft.tuners.lora.layer:LoraLayer._mixed_batch_forward",
        "peft.tuners.lora.layer:Linear.__init__",
        "peft.tuners.lora.layer:Linear.forward",
    ),
    fingerprints={"0.21.0": "2a84fcaaad9f2bef", "0.21.2": "2a84fcaaad9f2bef"},
)
EMBEDDING = Patch(
    target="peft.tuners.lora.layer:Embedding",
    replacement="peft_dist.patches.lora_layers:SelectiveEmbedding",
    kind="class swap",
    file="patches/lora_layers.py",
    library="peft",
    versions=PEFT,
    reason="Rows of many adapters in one call, without a loop over adapters.",
    relies_on=(
        "peft.tuners.lora.layer:Embedding.__init__",
        "peft.tuners.lora.layer:Embedding._mixed_batch_forward",
        "peft.tuners.lora.layer:Embedding._embed",
        "peft.tuners.lora.layer:Embedding.forward",
        "peft.tuners.tuners_utils:BaseTunerLayer._get_embed_scale",
    ),
    fingerprints={"0.21.0": "8ffb48c4e123b0ad", "0.21.2": "7d9e4f9ba2f63d0b"},
)
PEFT_MODEL = Patch(
    target="peft.peft_model:PeftModel",
    replacement="peft_dist.patches.peft_model:patched_class",
    kind="class swap",
    file="patches/peft_model.py",
    library="peft",
    versions=PEFT,
    reason="A call with adapter_names becomes one selective batch instead of hooks on every layer.",
    relies_on=(
        "peft.peft_model:PeftModel.forward",
        "peft.peft_model:PeftModel.generate",
        "peft.peft_model:PeftModel._enable_peft_forward_hooks",
        "peft.peft_model:PeftModelForCausalLM.forward",
        "peft.peft_model:PeftModelForCausalLM.generate",
        "peft.tuners.lora.model:LoraModel._enable_peft_forward_hooks",
    ),
    fingerprints={"0.21.0": "cd32d2d5c52b1550", "0.21.2": "cd32d2d5c52b1550"},
)
PEFT_MODEL_INIT = Patch(
    target="peft.peft_model:PeftModel.__init__",
    replacement="peft_dist.patches.every_model:patch_every_model",
    kind="replace",
    file="patches/every_model.py",
    library="peft",
    versions=PEFT,
    reason="patch() without a model patches every PeftModel made afterwards.",
    relies_on=("peft.peft_model:PeftModel.__init__",),
    fingerprints={"0.21.0": "6056c671dff3aefc", "0.21.2": "6056c671dff3aefc"},
)
FUSED_NORM = Patch(
    target="transformers.models.llama.modeling_llama:LlamaRMSNorm",
    replacement="peft_dist.patches.fused_norm:FusedNorm",
    kind="class swap",
    file="patches/fused_norm.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="One kernel for a norm, and for the addition before it.",
    relies_on=(
        "transformers.models.llama.modeling_llama:LlamaRMSNorm.forward",
        "transformers.models.gemma.modeling_gemma:GemmaRMSNorm.forward",
        "transformers.models.gemma.modeling_gemma:GemmaRMSNorm._norm",
        "transformers.models.gpt_oss.modeling_gpt_oss:GptOssRMSNorm.forward",
    ),
    fingerprints={"5.17.0": "509b78896d026243", "5.23.0": "509b78896d026243", "5.24.0": "509b78896d026243"},
)
FUSED_MLP = Patch(
    target="transformers.models.llama.modeling_llama:LlamaMLP",
    replacement="peft_dist.patches.fused_mlp:FusedMLP",
    kind="class swap",
    file="patches/fused_mlp.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Activation and product in one kernel, read from the joint projection.",
    relies_on=("transformers.models.llama.modeling_llama:LlamaMLP.forward",),
    fingerprints={"5.17.0": "3997a4458faa14a5", "5.23.0": "3997a4458faa14a5", "5.24.0": "3997a4458faa14a5"},
)
FUSED_ATTENTION = Patch(
    target="transformers.models.llama.modeling_llama:LlamaAttention",
    replacement="peft_dist.patches.fused_attention:FusedAttention",
    kind="class swap",
    file="patches/fused_attention.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Rotary embedding and KV write in one kernel, read from the joint projection.",
    relies_on=(
        "transformers.models.llama.modeling_llama:LlamaAttention.forward",
        "transformers.models.mistral.modeling_mistral:MistralAttention.forward",
        "transformers.models.qwen2.modeling_qwen2:Qwen2Attention.forward",
        "transformers.models.qwen3.modeling_qwen3:Qwen3Attention.forward",
        "transformers.models.gemma2.modeling_gemma2:Gemma2Attention.forward",
        "transformers.models.gemma3.modeling_gemma3:Gemma3Attention.forward",
        "transformers.models.llama.modeling_llama:apply_rotary_pos_emb",
        "transformers.models.llama.modeling_llama:rotate_half",
    ),
    fingerprints={"5.17.0": "84bc9edb5f74ac76", "5.23.0": "84bc9edb5f74ac76", "5.24.0": "f5b2d110cb3681f9"},
)
FUSED_LAYER = Patch(
    target="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
    replacement="peft_dist.patches.fused_layer:FusedLayer",
    kind="class swap",
    file="patches/fused_layer.py",
    library="transformers",
    versions=TRANSFORMERS,
    reason="Each addition in one kernel with the norm that reads the sum.",
    relies_on=(
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        "transformers.models.mixtral.modeling_mixtral:MixtralDecoderLayer.forward",
        "transformers.models.gemma2.modeling_gemma2:Gemma2DecoderLayer.forward",
        "transformers.models.gemma3.modeling_gemma3:Gemma3DecoderLayer.forward",
    ),
    fingerprints={"5.17.0": "8e9831926507cd78", "5.23.0": "1d656f269fab52d4", "5.24.0": "89504fed633c1b27"},
)

FUSIONS = (FUSED_NORM, FUSED_MLP, FUSED_ATTENTION, FUSED_LAYER)
PATCHES = (ATTENTION, ATTENTION_NAME, CACHE, BASE_FORWARD, LINEAR, EMBEDDING, PEFT_MODEL, PEFT_MODEL_INIT, *FUSIONS)
