"""One LangChain chain, `prompt | llm | parser`, with a retriever built on our search, on the live server."""

from pathlib import Path

import openai
import pytest
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from rag.collection import Collection
from rag.embed import Embedder


def test_a_chain_answers_from_retrieved_passages(served, home: Path, minilm_dir: Path):
    collection = Collection.open(home / "collections" / "house")
    embedder = Embedder.load(minilm_dir)

    def search(question: str) -> list[Document]:
        passages = collection.search(question, k=2, embedder=embedder)
        return [Document(passage.text, metadata={"file": passage.file}) for passage in passages]

    def joined(documents: list[Document]) -> str:
        return "\n\n".join(document.page_content for document in documents)

    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the text."), ("user", "{context}\n\nQuestion: {question}")]
    )
    llm = ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key=SecretStr(served.key),
        model="smol",
        temperature=0,
        max_completion_tokens=24,
    )
    context = RunnableLambda(search) | joined
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
    answer = chain.invoke("What is the red boat called?")
    assert "Heron" in answer
    assert "Heron" in "".join(chain.stream("What is the red boat called?"))
    collection.close()


def test_embeddings_of_texts_pass_and_those_of_token_ids_are_told_how(served):
    fields = {"base_url": f"{served.url}/v1", "api_key": SecretStr(served.key), "model": "all-minilm-l6-v2"}
    vector = OpenAIEmbeddings(**fields, check_embedding_ctx_length=False).embed_query("a boat")
    assert len(vector) == 384
    with openai.OpenAI(base_url=fields["base_url"], api_key=served.key) as client:
        for tokens in ([64, 9284], [[64, 9284], [1]]):  # LangChain's default sends the second
            with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
                client.embeddings.create(model="all-minilm-l6-v2", input=tokens)
