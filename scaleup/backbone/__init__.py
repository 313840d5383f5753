"""The frozen backbone: loading, precision, quantization and ZeRO-3 shards."""
