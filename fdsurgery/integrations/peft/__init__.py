"""Adapters of PEFT on converted models.

library       what the register knows of it
registration  sees to it that dynamic layers come here
lora          LoRA beside a dynamic layer; imports peft
"""
