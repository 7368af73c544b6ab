"""Our models where people already work: Hugging Face's classes, lm-evaluation-harness."""

from pipeline.interop.causal_lm import SLLMForCausalLM as SLLMForCausalLM
from pipeline.interop.causal_lm import StackForCausalLM as StackForCausalLM
