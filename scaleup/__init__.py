"""UniPELT (Mao et al., ACL 2022) as a scale-out toolkit on PEFT, Accelerate and DeepSpeed."""
