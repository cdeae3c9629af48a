"""What config.json and the weights of the recipes' models say."""

from hpo_verl.checks.model_size import DeltaLayers, ModelSize

DELTA = DeltaLayers(layers=18, key_heads=16, heads=16, key_size=128, value_size=128)
MODEL_SIZES = {
    "Qwen/Qwen2.5-1.5B-Instruct": ModelSize(
        1_543_714_304, 1536, 8960, 28, 12, 2, 128, 151_936, tied=True
    ),
    "Qwen/Qwen2.5-3B-Instruct": ModelSize(
        3_085_938_688, 2048, 11_008, 36, 16, 2, 128, 151_936, tied=True
    ),
    "meta-llama/Llama-3.2-3B-Instruct": ModelSize(
        3_212_749_824, 3072, 8192, 28, 24, 8, 128, 128_256, tied=True
    ),
    "Qwen/Qwen2.5-7B-Instruct": ModelSize(
        7_615_616_512, 3584, 18_944, 28, 28, 4, 128, 152_064, tied=False
    ),
    "Qwen/Qwen3-0.6B": ModelSize(
        596_049_920, 1024, 3072, 28, 16, 8, 128, 151_936, tied=True, head_norms=True
    ),
    "Qwen/Qwen3-1.7B": ModelSize(
        1_720_574_976, 2048, 6144, 28, 16, 8, 128, 151_936, tied=True, head_norms=True
    ),
    "Qwen/Qwen3-4B": ModelSize(
        4_022_468_096, 2560, 9728, 36, 32, 8, 128, 151_936, tied=True, head_norms=True
    ),
    # Without the tower that sees images.
    "Qwen/Qwen3.5-0.8B": ModelSize(
        752_393_024, 1024, 3584, 24, 8, 2, 256, 248_320, tied=True, head_norms=True, delta=DELTA
    ),
    "Qwen/Qwen3.5-2B": ModelSize(
        1_881_825_088, 2048, 6144, 24, 8, 2, 256, 248_320, tied=True, head_norms=True, delta=DELTA
    ),
}
