"""Adapters of PEFT on converted models.

registration  waits for peft, and sees to it that dynamic layers come here
lora          LoRA beside a dynamic layer; imports peft
"""
