# Real models that a laptop can hold: DINOv2-small and SmolLM2-135M-Instruct, stage 1 on captioned pictures.
# data/small is yours: captions_train.json and captions_test.json in LLaVA's format, images/, and words.json made by
#   python vocab.py --tokenizers HuggingFaceTB/SmolLM2-135M-Instruct google/gemma-3-270m --corpus ... --size 8192
stage = "pretrain"
out = "out/small/pretrain"
vision_tower = "facebook/dinov2-small"
image_size = 112                        # 8 x 8 patches
llm = "HuggingFaceTB/SmolLM2-135M-Instruct"
words = "data/small/words.json"
hidden = 1024
data = "data/small/captions_train.json"
images = "data/small/images"
image_mode = "pad"
template = "prompted"                   # a prompt in words; the same text for LLMs with and without a chat template
global_batch = 8
batch_size = 8
epochs = 3                              # 834 pictures: 315 steps
connector_lr = 3e-4
save_every = 50
workers = 1
