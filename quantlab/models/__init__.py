"""Checkpoints in memory. Importing this package registers quantlab's own architectures with transformers."""

from quantlab.quiet import quiet_imports

# Before transformers, which imports torchao where it is installed.
quiet_imports()

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from quantlab.models.configuration import QuantlabConfig
from quantlab.models.modeling import QuantlabForCausalLM, QuantlabModel

AutoConfig.register(QuantlabConfig.model_type, QuantlabConfig, exist_ok=True)
AutoModel.register(QuantlabConfig, QuantlabModel, exist_ok=True)
AutoModelForCausalLM.register(QuantlabConfig, QuantlabForCausalLM, exist_ok=True)
