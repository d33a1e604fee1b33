"""Every place where torch, transformers, PEFT and accelerate are changed. `_autoload` says which patch runs when."""
