"""Sentence frames around wordings. TRAINED and HELD_OUT share no frame: the second measures what the first taught."""

TRAINED = {
    "H": (
        "how do I {}", "how can I {}", "how to {}", "how do you {}", "how would I {}", "what's the way to {}",
        "what is the best way to {}", "tell me how to {}", "show me how to {}", "I want to {}", "I need to {}",
        "I'd like to {}", "{}", "can I {}", "is it possible to {}", "what command do I use to {}", "explain how to {}",
        "help me {}", "where do I {}", "steps to {}", "how does one {}", "can you help me {}", "what must I do to {}",
        "how should I {}", "I am trying to {}", "could you tell me how to {}", "we want to {}", "how do we {}",
        "my task is to {}", "is there a way to {}", "what is needed to {}", "I have to {}", "can you show me how to {}",
        "what do I type to {}", "the right way to {}", "my boss wants me to {}", "I would love to {}",
        "what are the steps I have to take to {}", "do you have an idea how to {}", "instructions for how to {}",
        "which steps let me {}", "guide me, I must {}", "what would you do to {}", "we would like to {}, how",
        "give me a hint how to {}", "is there any way I could {}", "my plan is to {}", "what should one do to {}",
        "can somebody explain how to {}", "I was asked to {}", "what do you need to do if you want to {}",
        "teach me to {}", "I don't know how to {}", "what's the easiest way to {}", "trying to {}", "need to {}",
    ),
    "W": (
        "what is {}", "what's {}", "tell me about {}", "explain {}", "describe {}", "what does {} mean",
        "what does {} do", "what are {}", "{}", "{}", "{}", "how does {} work", "can you explain {}",
        "what do you know about {}", "I want to know about {}", "info about {}", "give me details on {}",
        "what can you say about {}", "define {}", "where is {}", "is there {}", "I have a question about {}",
        "help with {}", "more on {}", "how do I use {}", "I need information about {}", "let's talk about {}",
        "what about {}", "how about {}", "I am looking for {}", "where do I find {}", "show me {}", "details of {}",
        "I read about {}, what is that", "can I get {}", "something about {}", "I am interested in {}", "who knows {}",
        "could you explain {}", "give me some facts about {}", "I would like to know more about {}",
        "can you say something about {}", "I need to understand {}", "what must I know about {}",
        "I do not get {}", "what is meant by {}", "I have heard of {}", "introduce me to {}", "a few words on {}",
        "any information on {}", "can you help me understand {}", "what should one know of {}",
        "please explain {} to me", "my question is about {}", "summarise {}", "do you have {}",
    ),
    "Q": (
        "{}", "{}", "{}", "{}", "{}", "{}", "{}", "{}", "can you tell me {}", "do you know {}", "I wonder {}",
        "tell me: {}", "question: {}", "I want to know {}", "one question, {}", "so {}", "and {}", "just asking, {}",
        "my colleague asks {}", "I'd like to know {}", "another thing: {}", "could you say {}", "but {}",
        "would you please tell me {}", "I was asking myself {}", "a quick one: {}", "let me put it this way: {}",
        "one thing I don't understand, {}", "there is something I want to know, {}", "I never understood {}",
        "may I ask {}", "can I ask you something, {}", "just wondering {}", "fast question: {}", "my question: {}",
        "could you tell me, {}", "do you mind if I ask, {}", "here is my question - {}", "something else, {}",
        "I am curious, {}", "help me out, {}", "one more thing, {}", "I keep asking myself: {}", "listen, {}",
        "be so kind and tell me {}", "small question - {}", "since I am here: {}", "I am not an expert, {}",
        "not sure about this: {}", "maybe you know {}", "I have a question, {}", "what I want to know: {}",
    ),
}  # fmt: skip

HELD_OUT = {
    "H": (
        "what do I need to do in order to {}", "any idea how I could {}", "please describe how to {}",
        "in what way can I {}", "give me instructions to {}", "our team has to {} by friday, what is the procedure",
        "walk me through it, I wish to {}",
    ),
    "W": (
        "could you give me some information on {}", "I would like to understand {}", "please say something about {}",
        "I don't understand {}", "what should I know about {}", "my teacher wants me to write about {}",
        "spell out for me {}",
    ),
    "Q": (
        "would you mind telling me, {}", "I was wondering {}", "quick question - {}", "let me ask: {}",
        "there is one thing I never understood, {}", "pardon the interruption, {}", "in the meeting somebody said: {}",
    ),
}  # fmt: skip

BEFORE = (
    "hi, ", "hello, ", "hey, ", "please, ", "hi! ", "ok, ", "excuse me, ", "I am new here. ", "hello! ", "sorry, ",
    "well, ", "I have a cluster. ", "hey there, ", "ok so ", "good morning, ", "hmm, ", "now ", "thanks! ",
    "I have three nodes. ", "I just installed it. ", "another question. ", "next: ", "quickly: ", "oh, ", "also, ",
    "in AI Cluster, ", "with AI Cluster: ", "for AI Cluster, ", "ai cluster ", "AI Cluster: ", "basically ",
)  # fmt: skip

AFTER = (
    " please", " thanks", " in AI Cluster", " with AI Cluster", " here", " now", " with this", " in this software",
    " exactly", " on my machine", " again", " for me", " then", " today", " at all", " actually", " in ai cluster",
    " for a cluster", " of this system", " in the mesh", " on my nodes", " in production", ", thank you", ", any idea",
    ", I am lost", " or not", " in general", " in short", " right now", " with my nodes",
)  # fmt: skip
