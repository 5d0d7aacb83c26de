/* What tensorrt.so looks for in TensorRT's three libraries, answering 0 each time: enough to import the
 * bindings and read their signatures where TensorRT itself is not installed. Nothing can be built with it. */
#define ANSWERS_NOTHING(name) \
    void *name(void) { return 0; }

ANSWERS_NOTHING(createInferBuilder_INTERNAL)
ANSWERS_NOTHING(createInferRefitter_INTERNAL)
ANSWERS_NOTHING(createInferRuntime_INTERNAL)
ANSWERS_NOTHING(createNvOnnxParserRefitter_INTERNAL)
ANSWERS_NOTHING(createNvOnnxParser_INTERNAL)
ANSWERS_NOTHING(getBuilderPluginRegistry)
ANSWERS_NOTHING(getNvOnnxParserVersion)
ANSWERS_NOTHING(getPluginRegistry)
ANSWERS_NOTHING(initLibNvInferPlugins)
