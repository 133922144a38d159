# The baseline of the paper's tables, stage 1: an MLP on the LLM that --llm names.
stage = "pretrain"
out = "out/paper/mlp_pretrain"
llm = "Qwen/Qwen2-7B-Instruct"
connector = "mlp"                                       # mlp2x_gelu
hidden = 0                                              # the LLM's width D, as in LLaVA-1.5
connector_lr = 1e-3                                     # LLaVA-1.5, stage 1
vision_tower = "openai/clip-vit-large-patch14-336"      # 336 pixels, 576 patches
data = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"    # 558,128 captions
images = "data/LLaVA-Pretrain/images"
checkpointing = True                                    # LLaVA-1.5
# The other values are defaults of train.py, see pretrain.py.
