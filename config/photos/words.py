# Photographs: the connector learns from captions which words a picture holds. The LLM gives its
# tokenizer and embeddings and is not trained. data/photos is yours: captions_train.json in LLaVA's
# format, images/, and words.json, see results/photos.sh.
stage = "words"
out = "out/photos/words"
vision_tower = "facebook/dinov2-small"
image_size = 224                        # 16 x 16 patches of the tower
pool = 2                                # 8 x 8 image tokens
llm = "HuggingFaceTB/SmolLM2-135M-Instruct"
words = "data/photos/words.json"
words_init = "embeds"
words_patch_weight = 0.3                # asks each patch for a word of the caption
temperature = 0.1                       # nearly one word a patch: the LLMs read no mixture of words
hidden = 512
data = "data/photos/captions_train.json"
images = "data/photos/images"
features = "out/photos/features"        # 49 KB a picture
template = "prompted"
global_batch = 32
batch_size = 32
epochs = 2                              # 30,455 captions of 6,091 pictures: 1,904 steps
connector_lr = 2e-3
dtype = "float32"                       # a CPU without bfloat16 products is faster so
workers = 0
log_every = 50
save_every = 200
