"""The connector for stock vLLM: ``scheduler`` decides, ``worker`` copies, ``connector`` is the class that vLLM looks
for."""
