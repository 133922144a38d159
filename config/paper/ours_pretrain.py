# Not the paper's: this project's own second stage at the paper's sizes. It trains on captions with
# the LLM, and the words loss holds the words. It has not been run at these sizes. words_loss is
# that of config/photos/pretrain.py, which ran on photographs with SmolLM2-135M.
stage = "pretrain"
out = "out/paper/ours_pretrain"
init = "out/paper/ours_words"
words_loss = 1.0
connector_lr = 2e-4                                     # a guess, as in ours_words.py
data = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
images = "data/LLaVA-Pretrain/images"
checkpointing = True
# For --dry_run without a checkpoint:
llm = "Qwen/Qwen2-0.5B-Instruct"
vision_tower = "openai/clip-vit-large-patch14-336"
words = "words.json"
