# Not the paper's: this project's own first stage at the paper's sizes. The connector learns from
# captions which words a picture holds, and the loss runs no LLM. It has not been run at these
# sizes. config/photos/words.py ran on 6,091 photographs. Its temperature of 0.1 is for LLMs that
# are not trained; here ours_pretrain.py follows.
stage = "words"
out = "out/paper/ours_words"
llm = "Qwen/Qwen2-0.5B-Instruct"                        # its tokenizer and E, for words_init
words = "words.json"
words_init = "embeds"
words_patch_weight = 0.3
connector_lr = 2e-4                                     # a guess: 2e-3 was right at H = 512
vision_tower = "openai/clip-vit-large-patch14-336"
data = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
images = "data/LLaVA-Pretrain/images"
