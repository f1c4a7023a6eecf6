defmodule Tinkex.CustomLoss.Training.LossFn do
  @moduledoc false
  # The second argument of Tinkex's own forward_backward_custom/4, which calls it twice in one
  # process: with tensors, for the metrics, and under Nx.Defn.grad, for the gradient. The first call
  # computes both and keeps the gradient g; the second one returns Σ g · logprobs, whose gradient it
  # is.
  #
  # Tinkex has then reserved the number of the backward pass, and a server that keeps the order
  # waits for it. So a loss that fails goes on with a gradient of zero, which trains nothing, and the
  # error is among the metrics, where Tinkex raises it once the backward pass is done.

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Training

  defmodule Failure do
    @moduledoc false
    # The name of a metric. Tinkex makes strings of names last of all.
    defstruct [:error]

    defimpl String.Chars do
      def to_string(%{error: error}), do: raise(error)
    end
  end

  @spec new(CustomLoss.server(), map()) :: ([map()], [map()] -> {map(), map()})
  def new(server, options) do
    unless Code.ensure_loaded?(Nx) do
      raise ArgumentError,
            "loss_fn/2 is for Tinkex's forward_backward_custom/4, which needs Nx: add :nx to your " <>
              "dependencies, or call Tinkex.CustomLoss.forward_backward_custom/4"
    end

    key = {__MODULE__, make_ref()}

    fn data, logprobs ->
      if Enum.any?(logprobs, &traced?/1),
        do: {linear(Process.get(key), logprobs), %{}},
        else: evaluate(server, data, logprobs, options, key)
    end
  end

  # Under grad there are expressions in the place of numbers.
  defp traced?(tensor), do: match?(%{data: %{__struct__: Nx.Defn.Expr}}, tensor)

  defp evaluate(server, data, logprobs, options, key) do
    case compute(server, data, logprobs, options) do
      {:ok, output} ->
        Process.put(key, output.gradients)
        {nx(:tensor, [output.loss_total]), Training.metrics(%{}, output, options.metrics)}

      {:error, error} ->
        Process.put(key, Enum.map(logprobs, &nx(:broadcast, [0.0, nx(:shape, [&1])])))
        {nx(:tensor, [0.0]), %{%Failure{error: error} => 0.0}}
    end
  end

  defp compute(server, data, logprobs, options) do
    with {:ok, output, _result} <- CustomLoss.run(server, data, logprobs, options),
         do: {:ok, output}
  rescue
    error -> {:error, error}
  catch
    :exit, reason -> {:error, RuntimeError.exception(Exception.format_exit(reason))}
  end

  defp linear(nil, _logprobs) do
    raise ArgumentError,
          "the function of loss_fn/2 was called under Nx.Defn.grad before it was called with " <>
            "tensors in the same process, as Tinkex does; make a new one for every step"
  end

  defp linear(gradients, logprobs) do
    gradients
    |> Enum.zip_with(logprobs, fn gradient, traced ->
      nx(:sum, [nx(:multiply, [gradient, traced])])
    end)
    |> Enum.reduce(&nx(:add, [&1, &2]))
  end

  # Nx is no dependency: it is there when this runs.
  defp nx(function, arguments), do: apply(Nx, function, arguments)
end
