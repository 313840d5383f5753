"""UniPELT as a PEFT method; depends on nothing else in scaleup except errors."""
