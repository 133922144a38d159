# Photographs, after words.py: captions on SmolLM2, which stays frozen. The words loss holds the
# words. It was measured after words.py --temperature=1 --words_patch_weight=0, and brings nothing
# over words.py alone: see docs/results.md.
stage = "pretrain"
out = "out/photos/pretrain"
init = "out/photos/words"
data = "data/photos/captions_train.json"
images = "data/photos/images"
features = "out/photos/features"
template = "prompted"
words_loss = 1.0
global_batch = 8
batch_size = 8
max_steps = 160                         # 1,280 captions, 20 minutes of one core
connector_lr = 7e-4
dtype = "float32"
workers = 0
log_every = 5
save_every = 20
