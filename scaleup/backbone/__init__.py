"""The frozen backbone: loading, precision, quantisation and ZeRO-3 shards."""
